package main

import (
	"errors"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageSnapshotCommand() *cobra.Command {
	var list bool
	var create, apply, remove string
	cmd := &cobra.Command{
		Use:   "snapshot IMAGE [--list | --create NAME | --apply SNAPSHOT | --delete SNAPSHOT] [-U] [--output human|json]",
		Short: "List, take, go back to and delete the internal snapshots of an image",
		Long: `List, take, go back to and delete the internal snapshots of an image. SNAPSHOT is an ID or a name; where it is both, the ID counts.
Without any of the flags the snapshots are listed.

Each takes effect at once and as a whole: whatever interrupts it, the image is as before or as asked for.`,
		Example: `  qcow-csi image snapshot --create before-upgrade disk.qcow2
  qcow-csi image snapshot --list disk.qcow2
  qcow-csi image snapshot --apply before-upgrade disk.qcow2
  qcow-csi image snapshot --delete before-upgrade disk.qcow2`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	a := addAccessFlags(cmd, true)
	flags := cmd.Flags()
	flags.BoolVarP(&list, "list", "l", false, "list the snapshots")
	flags.StringVarP(&create, "create", "c", "", "take a snapshot of this name")
	flags.StringVarP(&apply, "apply", "a", "", "make the disk what it was when this snapshot was taken; what was written since is lost")
	flags.StringVarP(&remove, "delete", "d", "", "delete this snapshot")
	cmd.MarkFlagsMutuallyExclusive("list", "create", "apply", "delete")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		changes := flags.Changed("create") || flags.Changed("apply") || flags.Changed("delete")
		switch {
		case changes && a.shared:
			return errors.New("--force-share is for listing only")
		case !changes:
			return listSnapshots(cmd, a, output, args[0])
		}
		return a.withImage(cmd.Context(), args[0], qcow.Options{}, func(_ *storage.OSFile, img *qcow.Image) error {
			switch {
			case flags.Changed("create"):
				s, err := img.CreateSnapshot(cmd.Context(), create, time.Now())
				if err != nil {
					return err
				}
				return output.say(cmd, describeSnapshot(&s), "Snapshot %s of %s: %s", s.ID, args[0], s.Name)
			case flags.Changed("apply"):
				if err := img.ApplySnapshot(cmd.Context(), apply); err != nil {
					return err
				}
				return output.say(cmd, usedSnapshot{args[0], apply}, "%s is what snapshot %s kept", args[0], apply)
			}
			if err := img.DeleteSnapshot(cmd.Context(), remove); err != nil {
				return err
			}
			return output.say(cmd, usedSnapshot{args[0], remove}, "Deleted snapshot %s of %s", remove, args[0])
		})
	}
	return cmd
}

// usedSnapshot is what the command prints in JSON of a snapshot that was applied or deleted.
type usedSnapshot struct {
	Filename string `json:"filename"`
	Snapshot string `json:"snapshot"` // as it was given
}

// listSnapshots needs neither a passphrase nor another file.
func listSnapshots(cmd *cobra.Command, a *access, output *outputFormat, path string) error {
	chain, err := a.readChain(path, false)
	if err != nil {
		return err
	}
	list := []snapshotInfo{}
	for i := range chain[0].headers.snapshots {
		list = append(list, describeSnapshot(&chain[0].headers.snapshots[i]))
	}
	if *output == outputJSON {
		return writeJSON(cmd.OutOrStdout(), list)
	}
	if len(list) == 0 {
		return nil
	}
	_, err = io.WriteString(cmd.OutOrStdout(), "Snapshot list:\n"+snapshotTable(list))
	return err
}

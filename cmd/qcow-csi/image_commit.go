package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageCommitCommand() *cobra.Command {
	var base string
	var drop bool
	cmd := &cobra.Command{
		Use:   "commit IMAGE [-b FILE] [-d] [-p] [--progress-fd N] [--output human|json]",
		Short: "Write what an image holds into its backing file",
		Long: `Write what an image holds into its backing file, or into one behind that, which grows where it is smaller. Then take it out of the image,
unless --drop says that the image won't be used again, or --base names a file further behind: the image is needed as it is then.

Other images on the same backing file, and those between the two, read otherwise afterwards: they are damaged by this. A crash at any
point loses nothing, and the command can be repeated.`,
		Example: `  qcow-csi image commit overlay.qcow2
  qcow-csi image commit -d overlay.qcow2
  qcow-csi image commit -b base.qcow2 overlay.qcow2`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	a := addAccessFlags(cmd, false)
	progress := addProgressFlags(cmd)
	cmd.Flags().StringVarP(&base, "base", "b", "", "the backing file to write into, as the image above it calls it, or as a path")
	cmd.Flags().BoolVarP(&drop, "drop", "d", false, "leave the image as it is")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		depth := 1
		if base != "" {
			chain, err := a.readChain(args[0], true)
			if err != nil {
				return err
			}
			if depth, err = depthOf(chain, base); err != nil {
				return err
			}
		}
		m, err := progress.meter(cmd, true)
		if err != nil {
			return err
		}
		defer m.stop()
		return a.withImage(cmd.Context(), args[0], qcow.Options{CommitDepth: depth}, func(_ *storage.OSFile, img *qcow.Image) error {
			chain := img.Chain()
			if len(chain) == 0 {
				return errors.New("the image has no backing file")
			}
			if err := img.Commit(cmd.Context(), qcow.CommitOptions{Empty: !drop && depth == 1, Progress: m.update}); err != nil {
				return err
			}
			m.finish()
			target := chain[depth-1].Name
			return output.say(cmd, committed{args[0], target}, "Committed %s to %s", args[0], target)
		})
	}
	return cmd
}

// committed is what commit prints in JSON.
type committed struct {
	Filename string `json:"filename"`
	Base     string `json:"base"`
}

// depthOf returns where in a chain the file base is: 1 for the image's own backing file. It is called as in a header, or by any path
// of the same file.
func depthOf(chain []*layer, base string) (int, error) {
	for depth := 1; depth < len(chain); depth++ {
		if chain[depth-1].headers.BackingFile == base {
			return depth, nil
		}
	}
	wanted, err := os.Stat(base)
	for depth := 1; depth < len(chain) && err == nil; depth++ {
		if l, err := os.Stat(chain[depth].path); err == nil && os.SameFile(l, wanted) {
			return depth, nil
		}
	}
	return 0, fmt.Errorf("%s is no backing file of %s", base, chain[0].path)
}

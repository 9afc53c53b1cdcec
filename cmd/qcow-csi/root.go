package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// envPrefix begins the environment variables that stand for flags: QCOW_CSI_STORAGE_DIR for --storage-dir.
const envPrefix = "QCOW_CSI_"

func newRootCommand() *cobra.Command {
	var logs logging
	root := &cobra.Command{
		Use:   "qcow-csi",
		Short: "Kubernetes volumes from qcow2 images",
		Long: `qcow-csi makes Kubernetes volumes from qcow2 images in a directory: thin, growing online, readable by
every QEMU tool. Its own engine reads and writes the images; no QEMU process is involved.

Every flag can also be given in the environment: --storage-dir as QCOW_CSI_STORAGE_DIR, and so on. The command
line wins.`,
		Example: `  qcow-csi all --storage-dir /var/lib/qcow-csi --node-id $(hostname)
  qcow-csi export disk.qcow2 --socket /run/disk.sock
  qcow-csi image check disk.qcow2`,
		SilenceUsage:  true,
		SilenceErrors: true, // main prints them
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := flagsFromEnvironment(cmd.Flags(), os.LookupEnv); err != nil {
				return err
			}
			return logs.start()
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	logs.addFlags(root.PersistentFlags())
	root.AddCommand(newAllCommand(), newExportCommand(), newImageCommand(), newVersionCommand())
	return root
}

// flagsFromEnvironment sets the flags that the command line has not.
func flagsFromEnvironment(flags *pflag.FlagSet, lookup func(string) (string, bool)) (err error) {
	flags.VisitAll(func(f *pflag.Flag) {
		name := envPrefix + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		value, set := lookup(name)
		if err != nil || f.Changed || !set || f.Name == "help" {
			return
		}
		if setErr := flags.Set(f.Name, value); setErr != nil {
			err = fmt.Errorf("environment variable %s: %w", name, setErr)
		}
	})
	return err
}

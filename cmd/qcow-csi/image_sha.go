package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
)

func newImageSHACommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "sha IMAGE [-f qcow2|raw] [-l SNAPSHOT] [-U] [-p] [--progress-fd N] [--output human|json]",
		Short: "Print the SHA-256 of what the virtual disk reads as",
		Long: `Print the SHA-256 of what the virtual disk reads as, backing files and all: two images of the same content have the same, however they
store it, and so has a raw file of that content.`,
		Example: `  qcow-csi image sha disk.qcow2
  qcow-csi image sha -l before-upgrade disk.qcow2
  qcow-csi image sha -f raw disk.raw`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	s := addSourceFlags(cmd)
	progress := addProgressFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		m, err := progress.meter(cmd, true)
		if err != nil {
			return err
		}
		defer m.stop()
		return s.with(cmd.Context(), args[0], func(disk *sourceDisk) error {
			h := sha256.New()
			if err := digest(cmd.Context(), h, disk, m.update); err != nil {
				return err
			}
			m.finish()
			sum := hex.EncodeToString(h.Sum(nil))
			if *output == outputJSON {
				return writeJSON(cmd.OutOrStdout(), digested{args[0], *s.snapshot, disk.Size(), sum})
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s  %s\n", sum, args[0])
			return err
		})
	}
	return cmd
}

// digested is what sha prints in JSON.
type digested struct {
	Filename string `json:"filename"`
	Snapshot string `json:"snapshot,omitempty"`
	Size     int64  `json:"size"` // bytes
	SHA256   string `json:"sha256"`
}

// digest hashes the content of a disk. It reads only what is stored.
func digest(ctx context.Context, h hash.Hash, disk qcow.Source, progress func(done, total int64)) error {
	size := disk.Size()
	b, zero := make([]byte, pieceBytes), make([]byte, pieceBytes)
	for e, err := range disk.Extents(0, size) {
		if err != nil {
			return err
		}
		stored := e.Kind == qcow.ExtentData || e.Kind == qcow.ExtentCompressed
		for off, end := e.Offset, e.Offset+e.Length; off < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			p := zero[:min(end-off, pieceBytes)]
			if stored {
				p = b[:len(p)]
				if n, err := disk.ReadAt(p, off); n < len(p) {
					return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
				}
			}
			h.Write(p)
			off += int64(len(p))
			progress(off, size)
		}
	}
	return nil
}

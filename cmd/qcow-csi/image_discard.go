package main

import (
	"bytes"
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageDiscardCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "discard IMAGE [-p] [--progress-fd N] [--output human|json]",
		Short: "Give back the space of clusters that hold nothing but zeroes",
		Long: `Look for clusters of the image that hold nothing but zeroes, and make them unallocated: they read as before, and their space goes
back to the file system. Where a backing file has something else, or a snapshot shares the cluster, the image says so
and the rest of this holds. Backing files are not looked at.`,
		Example: `  qcow-csi image discard disk.qcow2
  qcow-csi image discard --output json disk.qcow2 | jq .clusters`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	a := addAccessFlags(cmd, false)
	progress := addProgressFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		m, err := progress.meter(cmd, true)
		if err != nil {
			return err
		}
		defer m.stop()
		return a.withImage(cmd.Context(), args[0], qcow.Options{}, func(f *storage.OSFile, img *qcow.Image) error {
			d := discarded{Filename: args[0]}
			if d.Before, err = f.AllocatedBytes(); err != nil {
				return err
			}
			s := &zeroScan{img: img, unit: int64(img.Info().ClusterSize), progress: m.update}
			if d.Clusters, err = s.run(cmd.Context()); err != nil {
				return err
			}
			if err := img.Flush(); err != nil {
				return err
			}
			if d.After, err = f.AllocatedBytes(); err != nil {
				return err
			}
			m.finish()
			return output.say(cmd, d, "Discarded %d clusters of %s: the file takes %s, it took %s",
				d.Clusters, args[0], humanSize(d.After), humanSize(d.Before))
		})
	}
	return cmd
}

// discarded is what discard prints in JSON.
type discarded struct {
	Filename string `json:"filename"`
	Clusters int64  `json:"clusters"`
	Before   int64  `json:"before"` // bytes that the file takes on its file system
	After    int64  `json:"after"`
}

// scanBytes is how many bytes are looked at once, if a cluster is not larger.
const scanBytes = 4 << 20

// zeroScan makes clusters of zeroes unallocated.
type zeroScan struct {
	img      *qcow.Image
	unit     int64 // bytes of a cluster
	progress func(done, total int64)

	pos    int64 // everything before it has been looked at: a multiple of unit
	found  int64 // clusters
	buffer []byte
}

// run looks at the whole disk and returns how many clusters it has made unallocated.
func (s *zeroScan) run(ctx context.Context) (clusters int64, err error) {
	size := s.img.Size()
	for e, err := range s.img.Extents(0, size) {
		if err != nil {
			return s.found, err
		}
		end := e.Offset + e.Length
		// What marks zeroes and keeps a cluster for them, gives it up unread.
		if e.Depth == 0 && (e.Kind == qcow.ExtentData || e.Kind == qcow.ExtentCompressed || e.Kind == qcow.ExtentZero && e.Host != 0) {
			if err := s.extent(ctx, max(s.pos, e.Offset/s.unit*s.unit), min((end+s.unit-1)/s.unit*s.unit, size)); err != nil {
				return s.found, err
			}
		}
		s.progress(end, size)
	}
	return s.found, ctx.Err()
}

// extent looks at the clusters between off and end.
func (s *zeroScan) extent(ctx context.Context, off, end int64) error {
	if s.buffer == nil {
		s.buffer = make([]byte, max(scanBytes, s.unit))
	}
	for ; off < end; s.pos = off {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := s.buffer[:min(int64(len(s.buffer)), end-off)]
		if _, err := s.img.ReadAt(b, off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(b), off, err)
		}
		if err := s.clusters(b, off); err != nil {
			return err
		}
		off += int64(len(b))
	}
	return nil
}

// clusters unmaps those of the clusters at off, whose content is b, that hold nothing but zeroes.
func (s *zeroScan) clusters(b []byte, off int64) error {
	zero := make([]byte, s.unit)
	for len(b) > 0 {
		n := int64(0)
		for n < int64(len(b)) {
			c := b[n:min(n+s.unit, int64(len(b)))]
			if !bytes.Equal(c, zero[:len(c)]) {
				break
			}
			n += int64(len(c))
		}
		if n > 0 {
			if err := s.img.WriteZeroes(off, n, true); err != nil {
				return err
			}
			s.found += (n + s.unit - 1) / s.unit
		}
		skip := min(n+s.unit, int64(len(b)))
		b, off = b[skip:], off+skip
	}
	return nil
}

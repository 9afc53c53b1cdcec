package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageMapCommand() *cobra.Command {
	start, length := sizeValue(0), sizeValue(math.MaxInt64)
	cmd := &cobra.Command{
		Use:   "map IMAGE [--start-offset OFFSET] [--max-length LENGTH] [-U] [--output human|json]",
		Short: "Show which parts of the virtual disk have data, and where",
		Long: `Show which parts of the virtual disk have data, and where in which file of the chain it is. For people only those are listed; in JSON
the whole disk is, with the names of qemu-img map: "depth" is 0 for the image, 1 for its backing file and so on; "present" is false
where no file of the chain says anything, "zero" is true where the disk reads as zeroes, "data" where it is stored, "compressed"
where it is stored compressed; "offset" is where in the file, in bytes from its beginning, unless it is compressed or encrypted.`,
		Example: `  qcow-csi image map disk.qcow2
  qcow-csi image map --output json disk.qcow2 | jq 'map(select(.data).length) | add'`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	a := addAccessFlags(cmd, true)
	cmd.Flags().Var(&start, "start-offset", "where to begin, in bytes of the virtual disk")
	cmd.Flags().Var(&length, "max-length", "how many bytes of the virtual disk to describe")
	cmd.Flags().Lookup("max-length").DefValue = "the rest"
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		chain, err := a.readChain(args[0], true)
		if err != nil {
			return err
		}
		return a.withImage(cmd.Context(), args[0], qcow.Options{ReadOnly: true}, func(_ *storage.OSFile, img *qcow.Image) error {
			off := min(int64(start), img.Size())
			m := &diskMap{ctx: cmd.Context(), chain: chain, img: img, off: off, n: min(int64(length), img.Size()-off)}
			w := bufio.NewWriter(cmd.OutOrStdout())
			write := m.write
			if *output == outputJSON {
				write = m.writeJSON
			}
			return errors.Join(write(w), w.Flush())
		})
	}
	return cmd
}

// diskMap is the map of a part of a disk.
type diskMap struct {
	ctx    context.Context
	chain  []*layer
	img    *qcow.Image
	off, n int64
}

// extents describes the part of the disk, until ctx is done.
func (m *diskMap) extents() iter.Seq2[qcow.Extent, error] {
	return interrupted(m.ctx, m.img.Extents(m.off, m.n))
}

// host returns where the data of e is in its file.
func (m *diskMap) host(e *qcow.Extent) (off uint64, known bool) {
	l := m.chain[e.Depth]
	switch {
	case e.Kind == qcow.ExtentUnallocated, e.Kind == qcow.ExtentCompressed:
		return 0, false
	case l.headers == nil:
		return uint64(e.Offset), true // holes of a raw file too
	}
	return uint64(e.Host), l.headers.CryptMethod == 0 && (e.Kind == qcow.ExtentData || e.Host != 0)
}

func (m *diskMap) write(w io.Writer) error {
	const columns = "%-15s %-15s %-15s %s\n"
	if _, err := fmt.Fprintf(w, columns, "Offset", "Length", "Mapped to", "File"); err != nil {
		return err
	}
	hex := func(n uint64) string {
		if n == 0 {
			return "0" // as C has it
		}
		return fmt.Sprintf("%#x", n)
	}
	for e, err := range m.extents() {
		if err != nil {
			return err
		}
		if e.Kind != qcow.ExtentData && e.Kind != qcow.ExtentCompressed {
			continue
		}
		where := "encrypted"
		if off, known := m.host(&e); known {
			where = hex(off)
		} else if e.Kind == qcow.ExtentCompressed {
			where = "compressed"
		}
		if _, err := fmt.Fprintf(w, columns, hex(uint64(e.Offset)), hex(uint64(e.Length)), where, printable(m.chain[e.Depth].data())); err != nil {
			return err
		}
	}
	return nil
}

// mapEntry is an element of what qemu-img map --output=json prints.
type mapEntry struct {
	Start      int64   `json:"start"`
	Length     int64   `json:"length"`
	Depth      int     `json:"depth"`
	Present    bool    `json:"present"`
	Zero       bool    `json:"zero"`
	Data       bool    `json:"data"`
	Compressed bool    `json:"compressed"`
	Offset     *uint64 `json:"offset,omitempty"`
}

// writeJSON writes an element per line, as it finds them: the map of a large disk is long.
func (m *diskMap) writeJSON(w io.Writer) error {
	separator := "["
	for e, err := range m.extents() {
		if err != nil {
			return err
		}
		data := e.Kind == qcow.ExtentData || e.Kind == qcow.ExtentCompressed
		entry := mapEntry{
			Start: e.Offset, Length: e.Length, Depth: e.Depth,
			Present: e.Kind != qcow.ExtentUnallocated, Zero: !data, Data: data, Compressed: e.Kind == qcow.ExtentCompressed,
		}
		if off, known := m.host(&e); known {
			entry.Offset = &off
		}
		line, err := json.Marshal(entry)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "%s%s", separator, line); err != nil {
			return err
		}
		separator = ",\n"
	}
	if separator == "[" { // an empty disk
		_, err := io.WriteString(w, "[]\n")
		return err
	}
	_, err := io.WriteString(w, "]\n")
	return err
}

package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
)

const (
	// headSize covers what stands at the start: all filesystems' and partition tables' first sectors, btrfs at 64
	// KiB, the zfs labels of the first 512 KiB, UDF and VMFS at 1 MiB, the second header of LUKS at up to 4 MiB, the
	// first backup superblock of an ext4 with 1 KiB blocks at 8 MiB.
	headSize = 16 << 20
	// tailSize covers what stands at the end: GPT's backup, the md superblocks 0.90 and 1.0, the zfs labels of the last
	// 512 KiB, NTFS's and nilfs2's copies, the metadata of firmware RAIDs (up to 1.6 MB from the end).
	tailSize = 16 << 20
	// readSize is how much is read at a time; between two reads the context is asked.
	readSize = 1 << 20
)

// copies are the signatures in between.
var copies = []struct{ offset, length int64 }{
	{64 << 20, 4 << 10},  // btrfs's first copy
	{128 << 20, 4 << 10}, // ext4's first backup superblock with 4 KiB blocks
	{256 << 30, 4 << 10}, // btrfs's second copy
}

// isBlank reads every place of a device of size bytes where a signature could stand and says whether all are zeroes.
// Any read that fails or comes short is ErrUnreadable.
func isBlank(ctx context.Context, r io.ReaderAt, size int64) (bool, error) {
	tail := max(size-tailSize, 0)
	if blank, err := zeroes(ctx, r, 0, min(headSize, size)); !blank || err != nil {
		return false, err
	}
	if blank, err := zeroes(ctx, r, tail, size-tail); !blank || err != nil {
		return false, err
	}
	for _, c := range copies {
		if blank, err := zeroes(ctx, r, c.offset, min(c.length, size-c.offset)); !blank || err != nil {
			return false, err
		}
	}
	return true, nil
}

// zeroes says whether length bytes at offset all are zero; a length below 1 is nothing to read.
func zeroes(ctx context.Context, r io.ReaderAt, offset, length int64) (bool, error) {
	zero := make([]byte, readSize)
	buf := make([]byte, readSize)
	for ; length > 0; offset, length = offset+readSize, length-readSize {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		chunk := buf[:min(length, readSize)]
		n, err := r.ReadAt(chunk, offset)
		if n < len(chunk) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return false, fmt.Errorf("%w: %d bytes at offset %d: %w", ErrUnreadable, len(chunk), offset, err)
		}
		if !bytes.Equal(chunk, zero[:len(chunk)]) {
			return false, nil
		}
	}
	return true, nil
}

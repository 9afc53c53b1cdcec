package dehydrate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Rehydrate makes a sparse image of a dump. f must be empty; when Rehydrate returns nil the image in it is durable, else f is
// empty again, unless even that fails. It may read more of r than the dump.
//
// It fails with ErrCorrupt when the dump is torn or damaged, with ErrUnsupported when it is of a later version, and with ErrInvalid
// when f is not empty. The file is never longer than the dump says at its start.
func Rehydrate(ctx context.Context, r io.Reader, f storage.File) (*Result, error) {
	if size, err := f.Size(); err != nil || size != 0 {
		return nil, errors.Join(err, format.Invalidf("the file is not empty: it has %d bytes", size))
	}
	result, err := rehydrate(ctx, r, f)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("rehydrate: %w", err), f.Truncate(0))
	}
	return result, nil
}

func rehydrate(ctx context.Context, r io.Reader, f storage.File) (*Result, error) {
	d, err := newReader(bufio.NewReaderSize(r, 64<<10))
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(int64(d.length)); err != nil {
		return nil, err
	}
	result := &Result{Length: int64(d.length), KeysZeroed: d.flags&flagKeysZeroed != 0, NamesRedacted: d.flags&flagNamesRedacted != 0, Incomplete: d.flags&flagIncomplete != 0}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		off, n, content, err := d.run()
		if errors.Is(err, io.EOF) {
			return result, f.Sync()
		}
		if err != nil {
			return nil, err
		}
		if content != nil {
			if _, err := f.WriteAt(content, int64(off)); err != nil {
				return nil, err
			}
		}
		result.Metadata += int64(n)
	}
}

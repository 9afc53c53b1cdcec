package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// cacheMode is one of QEMU's cache modes, as a flag.
type cacheMode string

// cacheModes say what they do: past the page cache of the host, every write durable, nothing durable before the end.
var cacheModes = map[cacheMode]struct{ direct, through, unsafe bool }{
	"none":         {direct: true},
	"writeback":    {},
	"writethrough": {through: true},
	"directsync":   {direct: true, through: true},
	"unsafe":       {unsafe: true},
}

func (m *cacheMode) String() string { return string(*m) }
func (m *cacheMode) Type() string   { return "mode" }

// Set implements pflag.Value.
func (m *cacheMode) Set(s string) error {
	if _, ok := cacheModes[cacheMode(s)]; !ok {
		var names []string
		for _, name := range slices.Sorted(maps.Keys(cacheModes)) {
			names = append(names, string(name))
		}
		return fmt.Errorf("must be one of %s", strings.Join(names, ", "))
	}
	*m = cacheMode(s)
	return nil
}

// direct says whether the image is opened past the page cache.
func (m *cacheMode) direct() bool { return cacheModes[*m].direct }

// file returns what the engine gets for the file of the image.
func (m *cacheMode) file(f storage.File) storage.File {
	if cacheModes[*m].unsafe {
		return unsynced{f}
	}
	return f
}

// gate returns what opens the files that the image names. Its data file is as the image is.
func (m *cacheMode) gate(g qcow.Gate) qcow.Gate {
	return func(r qcow.Reference) (qcow.Opened, error) {
		o, err := g(r)
		if err == nil && !r.ReadOnly {
			o.File = m.file(o.File)
		}
		return o, err
	}
}

// backend returns what clients get for the image.
func (m *cacheMode) backend(b nbdexport.Backend) nbdexport.Backend {
	if cacheModes[*m].through {
		return writeThrough{b}
	}
	return b
}

// noCache is a flag without a value for the mode none.
type noCache struct{ mode *cacheMode }

func (noCache) String() string { return "" }
func (noCache) Type() string   { return "bool" }

// Set implements pflag.Value.
func (n noCache) Set(s string) error {
	on, err := strconv.ParseBool(s)
	if on {
		*n.mode = "none"
	}
	return err
}

// writeThrough is a backend whose writes are durable when they are acknowledged.
type writeThrough struct{ nbdexport.Backend }

// WriteAt implements nbdexport.Backend.
func (w writeThrough) WriteAt(p []byte, off int64) (int, error) { return w.WriteSync(p, off) }

// WriteZeroes implements nbdexport.Backend.
func (w writeThrough) WriteZeroes(off, n int64, how nbdexport.Zeroing) error {
	if err := w.Backend.WriteZeroes(off, n, how); err != nil {
		return err
	}
	return w.Flush()
}

// zeroDetector is a backend that does not write data of nothing but zeroes.
type zeroDetector struct {
	nbdexport.Backend
	unmap bool
}

// WriteAt implements nbdexport.Backend.
func (z zeroDetector) WriteAt(p []byte, off int64) (int, error) {
	if !allZero(p) {
		return z.Backend.WriteAt(p, off)
	}
	if err := z.WriteZeroes(off, int64(len(p)), nbdexport.Zeroing{MayUnmap: z.unmap}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteSync implements nbdexport.Backend.
func (z zeroDetector) WriteSync(p []byte, off int64) (int, error) {
	if !allZero(p) {
		return z.Backend.WriteSync(p, off)
	}
	if n, err := z.WriteAt(p, off); err != nil {
		return n, err
	}
	if err := z.Flush(); err != nil {
		return 0, err
	}
	return len(p), nil
}

// allZero compares each byte with the one before it, which is as fast as the machine compares memory.
func allZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

// unsynced is a file that is made durable once, when it is closed.
type unsynced struct{ storage.File }

// Sync implements storage.File.
func (unsynced) Sync() error { return nil }

// WriteSync implements storage.File.
func (u unsynced) WriteSync(p []byte, off int64) (int, error) { return u.WriteAt(p, off) }

// Close implements storage.File.
func (u unsynced) Close() error { return errors.Join(u.File.Sync(), u.File.Close()) }

package nbdexport_test

import (
	"iter"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// hollow is a backend of any size that keeps nothing: all of it is one hole. It notes its operations.
type hollow struct {
	journal
	info nbdexport.Info
}

func (h *hollow) Info() nbdexport.Info { return h.info }

func (h *hollow) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	return len(p), h.note(nbdtest.Operation{Kind: nbdtest.Read, Offset: off, Length: int64(len(p))})
}

func (h *hollow) ReadExtent(p []byte, off int64) (int, bool, error) {
	return len(p), true, h.note(nbdtest.Operation{Kind: nbdtest.Read, Offset: off, Length: int64(len(p))})
}

func (h *hollow) Splice(int, int64, int) (int, error) { return 0, nil }

func (h *hollow) WatchSplices(func() bool) (forget func()) { return func() {} }

func (h *hollow) WriteAt(p []byte, off int64) (int, error) {
	return len(p), h.note(nbdtest.Operation{Kind: nbdtest.Write, Offset: off, Length: int64(len(p))})
}

func (h *hollow) WriteSync(p []byte, off int64) (int, error) {
	return len(p), h.note(nbdtest.Operation{Kind: nbdtest.WriteSync, Offset: off, Length: int64(len(p))})
}

func (h *hollow) WriteZeroes(off, n int64, how nbdexport.Zeroing) error {
	return h.note(nbdtest.Operation{Kind: nbdtest.WriteZeroes, Offset: off, Length: n, How: how})
}

func (h *hollow) Discard(off, n int64) error {
	return h.note(nbdtest.Operation{Kind: nbdtest.Discard, Offset: off, Length: n})
}

func (h *hollow) Flush() error { return h.note(nbdtest.Operation{Kind: nbdtest.Flush}) }

func (h *hollow) Extents(context string, off, n int64) iter.Seq2[nbdexport.Extent, error] {
	return func(yield func(nbdexport.Extent, error) bool) {
		err := h.note(nbdtest.Operation{Kind: nbdtest.Describe, Offset: off, Length: n, Context: context})
		yield(nbdexport.Extent{Length: n, Flags: nbdexport.StateHole | nbdexport.StateZero}, err)
	}
}

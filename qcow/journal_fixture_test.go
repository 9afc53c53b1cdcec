package qcow_test

import (
	"fmt"
	"iter"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// memoryJournal is a journal in a file that a recorder may watch.
type memoryJournal struct{ f storage.File }

// newJournal returns an empty journal with room for so many links in each bank.
func newJournal(links int) *memoryJournal {
	return &memoryJournal{storage.NewMemoryFrom(make([]byte, 2*64*(1+links)))}
}

func (j *memoryJournal) Load() []byte {
	n, err := j.f.Size()
	if err != nil {
		panic(err)
	}
	b := make([]byte, n)
	if k, err := j.f.ReadAt(b, 0); k < len(b) {
		panic(err)
	}
	return b
}

func (j *memoryJournal) Store(off int, b []byte) {
	if _, err := j.f.WriteAt(b, int64(off)); err != nil {
		panic(err)
	}
}

func (j *memoryJournal) Close() error { return nil }

func (j *memoryJournal) Remove() error { return nil }

// copied returns a journal with what is in this one now.
func (j *memoryJournal) copied() *memoryJournal {
	return &memoryJournal{storage.NewMemoryFrom(j.Load())}
}

// shared returns a new directory in memory that outlives a process.
func shared(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "qcow-csi-test-") //nolint:usetesting // t.TempDir may be on a disk
	require.Feature(t, err == nil, fmt.Sprintf("needs a file system in memory: %v", err))
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

const journalName = "journal"

// addJournal records what happens to the journal together with what happens to the files.
func (w *chainCrash) addJournal(o *qcow.Options) {
	j := o.Journal.(*memoryJournal)
	w.names = append(w.names, journalName)
	w.kinds[journalName] = "raw"
	w.initial = append(w.initial, slices.Clone(j.Load()))
	w.live[journalName] = w.group.Record(j.f)
	o.Journal = &memoryJournal{w.live[journalName]}
}

// crashStates are what a crash leaves of the files: after a kill with the journal as it was then, after a power loss without it.
func (w *chainCrash) crashStates(ops []storage.Op, o storage.CrashOptions) iter.Seq[storage.GroupCrashState] {
	n := slices.Index(w.names, journalName)
	if n < 0 {
		return storage.GroupCrashStates(w.initial, ops, o)
	}
	return func(yield func(storage.GroupCrashState) bool) {
		for s := range storage.GroupCrashStates(w.initial, ops, o) {
			if s.Kind != storage.Kill {
				break
			}
			if !yield(s) {
				return
			}
		}
		ops = slices.Clone(ops)
		for i := range ops {
			if ops[i].File == n {
				ops[i] = storage.Op{Kind: storage.OpMark}
			}
		}
		for s := range storage.GroupCrashStates(w.initial, ops, o) {
			if s.Kind != storage.Kill && !yield(s) {
				return
			}
		}
	}
}

// killedAgain returns the files, of which one is an image and one its journal, as they are when the process that opens them after a kill is killed
// as well, on some point of its way.
func (w *chainCrash) killedAgain(f files) (files, error) {
	var group storage.RecorderGroup
	initial := [][]byte{contentOf(w.t, f[w.top]), contentOf(w.t, f[journalName])}
	opening := maps.Clone(f)
	opening[w.top], opening[journalName] = group.Record(f[w.top]), group.Record(f[journalName])
	if _, err := qcow.Open(opening[w.top], qcow.Options{Gate: opening.gate, Journal: &memoryJournal{opening[journalName]}}); err != nil {
		return nil, err
	}
	var left []storage.GroupCrashState
	for s := range storage.GroupCrashStates(initial, group.Ops(), storage.CrashOptions{}) {
		if s.Kind != storage.Kill {
			break
		}
		left = append(left, s)
	}
	if len(left) > 0 {
		s := left[w.rng.IntN(len(left))]
		opening[w.top], opening[journalName] = storage.NewMemoryFrom(s.Contents[0]), storage.NewMemoryFrom(s.Contents[1])
		return opening, nil
	}
	return f, nil
}

// killed opens an image as a killed process left it, file and journal, which may go on changing.
func killed(t *testing.T, f *storage.Memory, j *memoryJournal, o qcow.Options) (*qcow.Image, *storage.Memory) {
	t.Helper()
	o.Journal = j.copied() // before the file: what is settled meanwhile is in both
	left := storage.NewMemoryFrom(slices.Clone(f.Bytes()))
	return open(t, left, o), left
}

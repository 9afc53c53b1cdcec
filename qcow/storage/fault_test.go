package storage

import (
	"errors"
	"slices"
	"syscall"
	"testing"
)

// fourChanges changes f four times and returns which changes failed.
func fourChanges(t *testing.T, f File) (failed []int) {
	t.Helper()
	_, writeErr := f.WriteAt([]byte("abcd"), 0)
	for i, err := range []error{writeErr, f.PunchHole(1, 1), f.Truncate(3), f.Sync()} {
		if err != nil {
			failed = append(failed, i)
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("operation %d: %v", i, err)
			}
		}
	}
	return failed
}

func TestFaults(t *testing.T) {
	for name, c := range map[string]struct {
		fault  *Fault
		failed []int
		left   string
	}{
		"none":              {nil, nil, "a\x00c"},
		"beyond the end":    {&Fault{At: 4}, nil, "a\x00c"},
		"first once":        {&Fault{At: 0}, []int{0}, "\x00\x00\x00"},
		"second once":       {&Fault{At: 1}, []int{1}, "abc"},
		"third for ever":    {&Fault{At: 2, Forever: true}, []int{2, 3}, "a\x00cd"},
		"sync once":         {&Fault{At: 3}, []int{3}, "a\x00c"},
		"short write":       {&Fault{At: 0, Short: true}, []int{0}, "a\x00\x00"},
		"short is no punch": {&Fault{At: 1, Short: true}, []int{1}, "abc"},
		"all":               {&Fault{Forever: true}, []int{0, 1, 2, 3}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if c.fault != nil {
				c.fault.Err = syscall.EIO
			}
			mem := NewMemory()
			f := NewFaults(mem, c.fault)
			if failed := fourChanges(t, f); !slices.Equal(failed, c.failed) {
				t.Errorf("operations %v failed, want %v", failed, c.failed)
			}
			if total, injected := f.Count(); total != 4 || injected != len(c.failed) {
				t.Errorf("counted %d operations and %d faults", total, injected)
			}
			expectContent(t, mem, []byte(c.left))
		})
	}
}

func TestFaultShortWriteSaysHowMuch(t *testing.T) {
	mem := NewMemory()
	f := NewFaults(mem, &Fault{Err: syscall.EIO, Short: true})
	if n, err := f.WriteAt([]byte("abcde"), 0); n != 2 || !errors.Is(err, syscall.EIO) {
		t.Errorf("short write: %d, %v", n, err)
	}
	expectContent(t, mem, []byte("ab"))
}

package storage

import (
	"errors"
	"slices"
	"syscall"
	"testing"
)

// sixChanges changes f in every way there is, once, and returns which changes failed.
func sixChanges(t *testing.T, f File) (failed []int) {
	t.Helper()
	_, writeErr := f.WriteAt([]byte("abcd"), 0)
	punchErr, truncateErr, syncErr := f.PunchHole(1, 1), f.Truncate(3), f.Sync()
	_, writeSyncErr := f.WriteSync([]byte("ef"), 4)
	for i, err := range []error{writeErr, punchErr, truncateErr, syncErr, writeSyncErr, f.Allocate(1, 7)} {
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
		"none":             {nil, nil, "a\x00c\x00ef\x00\x00"},
		"beyond the end":   {&Fault{At: 6}, nil, "a\x00c\x00ef\x00\x00"},
		"first once":       {&Fault{At: 0}, []int{0}, "\x00\x00\x00\x00ef\x00\x00"},
		"second once":      {&Fault{At: 1}, []int{1}, "abc\x00ef\x00\x00"},
		"third for ever":   {&Fault{At: 2, Forever: true}, []int{2, 3, 4, 5}, "a\x00cd"},
		"sync once":        {&Fault{At: 3}, []int{3}, "a\x00c\x00ef\x00\x00"},
		"write-sync once":  {&Fault{At: 4}, []int{4}, "a\x00c\x00\x00\x00\x00\x00"},
		"allocate once":    {&Fault{At: 5}, []int{5}, "a\x00c\x00ef"},
		"short write":      {&Fault{At: 0, Short: true}, []int{0}, "a\x00\x00\x00ef\x00\x00"},
		"short write-sync": {&Fault{At: 4, Short: true}, []int{4}, "a\x00c\x00e\x00\x00\x00"},

		"short is no punch":    {&Fault{At: 1, Short: true}, []int{1}, "abc\x00ef\x00\x00"},
		"short is no allocate": {&Fault{At: 5, Short: true}, []int{5}, "a\x00c\x00ef"},
		"all":                  {&Fault{Forever: true}, []int{0, 1, 2, 3, 4, 5}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if c.fault != nil {
				c.fault.Err = syscall.EIO
			}
			mem := NewMemory()
			f := NewFaults(mem, c.fault)
			if failed := sixChanges(t, f); !slices.Equal(failed, c.failed) {
				t.Errorf("operations %v failed, want %v", failed, c.failed)
			}
			if total, injected := f.Count(); total != 6 || injected != len(c.failed) {
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

// Reading is never made to fail.
func TestFaultsCountChangesOnly(t *testing.T) {
	f := NewFaults(NewMemoryFrom([]byte("x")), &Fault{Err: syscall.EIO, Forever: true})
	if _, _, err := f.NextData(0); err != nil {
		t.Error(err)
	}
	if _, err := f.ReadAt(make([]byte, 1), 0); err != nil {
		t.Error(err)
	}
	if total, _ := f.Count(); total != 0 {
		t.Errorf("counted %d operations", total)
	}
}

package storage

import (
	"bytes"
	"errors"
	"syscall"
	"testing"
)

func TestMemoryLimit(t *testing.T) {
	m := NewMemory()
	m.Limit(4)
	mustWrite(t, m, []byte("abcd"), 0)
	_, err := m.WriteAt([]byte("ef"), 3)
	for what, err := range map[string]error{"write": err, "truncate": m.Truncate(5)} {
		if !errors.Is(err, ErrNoSpace) || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s past the limit: %v", what, err)
		}
	}
	expectContent(t, m, []byte("abcd"))
	m.Limit(2) // what is there already stays, and can be written
	mustWrite(t, m, []byte("x"), 3)
	expectContent(t, m, []byte("abcx"))
	mustDo(t, m.Truncate(1))
	if err := m.Truncate(3); !errors.Is(err, ErrNoSpace) {
		t.Errorf("growing past a lowered limit: %v", err)
	}
	m.Limit(0)
	mustDo(t, m.Truncate(3))
	expectContent(t, m, []byte("a\x00\x00"))
}

func TestMemoryShrunkAndGrownReadsZeroes(t *testing.T) {
	m := NewMemoryFrom(bytes.Repeat([]byte{1}, 100))
	mustDo(t, m.Truncate(10), m.Truncate(50))
	mustWrite(t, m, []byte{2}, 99)
	want := make([]byte, 100)
	copy(want, bytes.Repeat([]byte{1}, 10))
	want[99] = 2
	expectContent(t, m, want)
}

func TestMemoryBytesIsACopy(t *testing.T) {
	m := NewMemoryFrom([]byte("abc"))
	m.Bytes()[0] = 'x'
	expectContent(t, m, []byte("abc"))
}

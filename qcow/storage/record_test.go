package storage

import (
	"bytes"
	"fmt"
	"sync"
	"syscall"
	"testing"
)

func TestRecorder(t *testing.T) {
	mem := NewMemory()
	mem.Limit(16)
	r := NewRecorder(mem)
	p := []byte("abc")
	mustWrite(t, r, p, 1)
	p[0] = 'x' // the log has its own copy
	r.Mark("note")
	if _, err := r.WriteAt(p, 100); err == nil {
		t.Fatal("a write past the limit succeeded")
	}
	if err := r.Truncate(100); err == nil {
		t.Fatal("a truncate past the limit succeeded")
	}
	if err := r.Allocate(0, 100); err == nil {
		t.Fatal("an allocation past the limit succeeded")
	}
	mustDo(t, r.PunchHole(2, 1), r.Sync(), r.Truncate(3), r.Allocate(2, 3))
	if n, err := r.WriteSync([]byte("de"), 4); n != 2 || err != nil {
		t.Fatalf("synchronous write: %d, %v", n, err)
	}
	if _, err := r.ReadAt(make([]byte, 1), 0); err != nil {
		t.Fatal(err)
	}
	const want = "write 0x1+0x3\n# note\npunch 0x2+0x1\nsync\ntruncate 0x3\nallocate 0x2+0x3\nwrite-sync 0x4+0x2\n"
	ops := r.Ops()
	if got := Trace(ops); got != want {
		t.Errorf("the log is\n%swant\n%s", got, want)
	}
	if string(ops[0].Data) != "abc" {
		t.Errorf("the log has the data %q", ops[0].Data)
	}
	expectContent(t, r, []byte("\x00a\x00\x00de"))
}

// A write that fails halfway has left something in the file, which is not durable however it was written.
func TestRecorderLogsWhatAFailedWriteLeft(t *testing.T) {
	for name, write := range map[string]func(*Recorder, []byte, int64) (int, error){"write": (*Recorder).WriteAt, "write-sync": (*Recorder).WriteSync} {
		t.Run(name, func(t *testing.T) {
			r := NewRecorder(NewFaults(NewMemory(), &Fault{Err: syscall.EIO, Short: true}))
			if n, err := write(r, []byte("abcd"), 5); n != 2 || err == nil {
				t.Fatalf("short write: %d, %v", n, err)
			}
			if ops := r.Ops(); len(ops) != 1 || ops[0].Kind != OpWrite || string(ops[0].Data) != "ab" || ops[0].Offset != 5 {
				t.Errorf("the log is %v", ops)
			}
		})
	}
}

// The recorders of a group share one log, which tells their files apart.
func TestRecorderGroup(t *testing.T) {
	var g RecorderGroup
	first, second := NewMemory(), NewMemory()
	a, b := g.Record(first), g.Record(second)
	mustWrite(t, a, []byte("abc"), 0)
	g.Mark("note")
	mustWrite(t, b, []byte("de"), 1)
	mustDo(t, b.Sync(), a.PunchHole(0, 1), b.Allocate(0, 4), b.Truncate(2), a.Sync())
	b.Mark("end")
	const want = "write 0x0+0x3\n# note\nfile 1: write 0x1+0x2\nfile 1: sync\npunch 0x0+0x1\nfile 1: allocate 0x0+0x4\nfile 1: truncate 0x2\nsync\n# end\n"
	for name, ops := range map[string][]Op{"group": g.Ops(), "first": a.Ops(), "second": b.Ops()} {
		if got := Trace(ops); got != want {
			t.Errorf("the log of %s is\n%swant\n%s", name, got, want)
		}
	}
	expectContent(t, first, []byte("\x00bc"))
	expectContent(t, second, []byte("\x00d"))
}

// The order of the log is the order in which concurrent writes took effect: repeated, it gives the same content.
func TestRecorderOrder(t *testing.T) {
	mem := NewMemory()
	r := NewRecorder(mem)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for k := range 50 {
				if _, err := r.WriteAt(fmt.Appendf(nil, "%d-%02d", i, k), int64(k%5)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	replay := NewMemory()
	ops := r.Ops()
	for _, op := range ops {
		contents{replay}.apply(op)
	}
	if len(ops) != 400 || !bytes.Equal(replay.Bytes(), mem.Bytes()) {
		t.Errorf("%d operations in the log; repeated they give %q, not %q", len(ops), replay.Bytes(), mem.Bytes())
	}
}

package qcow_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

const (
	victimDisk = 32 << 20
	victims    = 4 // goroutines, each of which owns a part of the disk
	victimDirs = "QCOW_CSI_TEST_VICTIM"
)

// openVictim opens the image in dir with the journal in another directory.
func openVictim(t *testing.T, dir, memory string) *qcow.Image {
	t.Helper()
	f, err := storage.Open(filepath.Join(dir, "top"), storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	j, err := storage.OpenJournal(filepath.Join(memory, "journal"), f)
	if err != nil {
		t.Fatal(err)
	}
	return open(t, f, qcow.Options{Gate: qcow.Within(dir), Journal: j})
}

// beVictim is what the process does that TestJournalSurvivesKill kills. It says what was acknowledged: offset, length and value.
func beVictim(t *testing.T, dir, memory string) {
	img := openVictim(t, dir, memory)
	out := os.NewFile(3, "acknowledged")
	var wg sync.WaitGroup
	start := uint64(time.Now().UnixNano())
	for i := range int64(victims) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(start, uint64(i)))
			for value := start; ; value++ {
				const part = victimDisk / victims
				n := sector * (1 + rng.Int64N(20))
				off := i*part + rng.Int64N((part-n)/sector)*sector
				if _, err := img.WriteAt(sectorsOf(value, n), off); err != nil {
					panic(err)
				}
				said := binary.BigEndian.AppendUint64(nil, uint64(off))
				said = binary.BigEndian.AppendUint64(said, uint64(n))
				if _, err := out.Write(binary.BigEndian.AppendUint64(said, value)); err != nil {
					panic(err)
				}
				if rng.IntN(2000) == 0 {
					if err := img.Flush(); err != nil {
						panic(err)
					}
				}
			}
		})
	}
	wg.Wait()
}

// TestJournalSurvivesKill kills a process that writes to an image over a backing file, again and again: the next one finds all that was acknowledged.
func TestJournalSurvivesKill(t *testing.T) {
	if dirs := filepath.SplitList(os.Getenv(victimDirs)); len(dirs) == 2 {
		beVictim(t, dirs[0], dirs[1])
	}
	rounds := 6
	if long() {
		rounds = 200
	}
	dir, memory := t.TempDir(), shared(t)
	base, err := storage.Create(filepath.Join(dir, "base"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := base.WriteAt(sectorsOf(1, victimDisk), 0); err != nil {
		t.Fatal(err)
	}
	top, err := storage.Create(filepath.Join(dir, "top"))
	if err != nil {
		t.Fatal(err)
	}
	o := qcow.CreateOptions{Size: victimDisk, BackingFile: "base", BackingFormat: "raw", ClusterSize: 16 << 10}
	if err := errors.Join(base.Close(), qcow.Create(top, o), top.Close()); err != nil {
		t.Fatal(err)
	}
	want := make([]uint64, victimDisk/sector)
	for i := range want {
		want[i] = 1
	}
	restored := 0
	for range rounds {
		killVictim(t, dir, memory, want)
		img := openVictim(t, dir, memory)
		r := img.Restored()
		if restored += r.Clusters; r.Lost > 0 {
			t.Errorf("%+v", r)
		}
		got := make([]byte, sector)
		for s := range want {
			if _, err := img.ReadAt(got, int64(s)*sector); err != nil {
				t.Fatal(err)
			}
			// What was under way may be there too.
			if value := binary.BigEndian.Uint64(got); value < want[s] {
				t.Fatalf("sector %d has the value %d, but %d was acknowledged", s, value, want[s])
			} else {
				want[s] = value
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d clusters restored", restored)
	top, err = storage.Open(filepath.Join(dir, "top"), storage.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	report, err := check.Check(t.Context(), top, check.Options{})
	if err := errors.Join(err, top.Close()); err != nil || report.Corruptions > 0 {
		t.Errorf("%v, %v", report, err)
	}
}

// killVictim lets a victim work for a while, and notes what it says was acknowledged.
func killVictim(t *testing.T, dir, memory string, want []uint64) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestJournalSurvivesKill$")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s%c%s", victimDirs, dir, filepath.ListSeparator, memory))
	cmd.ExtraFiles = []*os.File{w}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	begun := make(chan struct{})
	done := make(chan int)
	go func() {
		in, n := bufio.NewReader(r), 0
		for said := make([]byte, 24); ; n++ {
			if _, err := io.ReadFull(in, said); err != nil {
				break
			}
			if n == 0 {
				close(begun)
			}
			off, length := binary.BigEndian.Uint64(said), binary.BigEndian.Uint64(said[8:])
			for s := off / sector; s < (off+length)/sector; s++ {
				want[s] = binary.BigEndian.Uint64(said[16:])
			}
		}
		done <- n
	}()
	select {
	case <-begun:
	case <-time.After(time.Minute):
		t.Error("the victim does nothing")
	}
	time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	if n := <-done; n == 0 {
		t.Error("nothing was acknowledged")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

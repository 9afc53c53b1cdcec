package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// An amendCase is an image and what is to become of it.
type amendCase struct {
	name string
	make func(f *workshop) // makes "image"
	o    qcow.AmendOptions
	// Of these passphrases each state must open with one; none: the image is not encrypted.
	passphrases []string
}

func amendCases() []amendCase {
	// Data, zeroes and snapshots that share tables and clusters in all ways.
	layered := func(options string) func(f *workshop) {
		return func(f *workshop) {
			f.qemu("image", 96<<10, options)
			f.io("image", "write -P 1 0 20k", "write -P 2 40k 4k")
			f.snapshot("image", "-c", "a")
			f.io("image", "write -z 2k 6k", "write -z -u 10k 2k", "write -P 3 18k 4k")
			f.snapshot("image", "-c", "b")
			f.io("image", "write -z 40k 4k", "write -P 4 42k 1k")
			// This leaves free clusters that are not zeroes.
			f.io("image", "write -P 0x99 60k 20k")
			f.snapshot("image", "-c", "c")
			f.io("image", "write -P 5 60k 20k")
			f.snapshot("image", "-d", "c")
		}
	}
	quick := luks.KeyOptions{Iterations: luks.MinIterations}
	encrypted := func(f *workshop) {
		o := cheap()
		o.Cipher = "aes-128"
		f.create("image", recipe{o: qcow.CreateOptions{Size: 32 << 10, ClusterSize: 4096, Encryption: o}})
		f.io("image", "write -P 5 0 20k")
	}
	return []amendCase{
		{name: "upgrade", make: layered("compat=0.10,cluster_size=1k"), o: qcow.AmendOptions{Version: 3, LazyRefcounts: &yes}},
		{name: "upgrade of snapshots without size", make: func(f *workshop) {
			layered("compat=0.10,cluster_size=1k")(f)
			f.shortenSnapshots("image")
		}, o: qcow.AmendOptions{Version: 3, RefcountBits: 4}},
		{name: "upgrade with a long backing name", make: func(f *workshop) {
			f.qemu("image", 96<<10, "compat=0.10,cluster_size=4k,backing_fmt=qcow2,backing_file="+longName())
			f.io("image", "write -P 1 4k 4k")
		}, o: version3},
		{name: "downgrade", make: layered("cluster_size=1k"), o: version2},
		{name: "downgrade over backing", make: layered("cluster_size=512," + qemuBacking), o: version2},
		{name: "downgrade with data that only a mark in a snapshot shares", make: func(f *workshop) {
			f.qemu("image", 96<<10, "cluster_size=1k,"+qemuBacking)
			f.io("image", "write -P 1 0 20k")
			f.snapshot("image", "-c", "a")
			f.io("image", "write -z 2k 6k")
			f.snapshot("image", "-c", "b")
			f.snapshot("image", "-a", "a")
			f.snapshot("image", "-d", "a")
		}, o: version2},
		{name: "downgrade with another width", make: layered("cluster_size=1k,refcount_bits=64"), o: qcow.AmendOptions{Version: 2, RefcountBits: 16}},
		{name: "downgrade of the engine's own", make: func(f *workshop) {
			f.create("image", recipe{o: qcow.CreateOptions{Size: 64 << 10, ClusterSize: 512, BackingFile: "base.qcow2", BackingFormat: "qcow2"}})
			f.change("image", func(img *qcow.Image) {
				writeAt(f.t, img, repeated(1, 20<<10), 0)
				if err := errors.Join(img.Discard(2048, 4096), img.Discard(40<<10, 8<<10)); err != nil {
					f.t.Fatal(err)
				}
				if _, err := img.CreateSnapshot(f.t.Context(), "a", time.Unix(1, 0)); err != nil {
					f.t.Fatal(err)
				}
				if err := img.WriteZeroes(6<<10, 6<<10, false); err != nil {
					f.t.Fatal(err)
				}
			})
		}, o: version2},
		{name: "wider", make: layered("cluster_size=512,refcount_bits=4"), o: qcow.AmendOptions{RefcountBits: 64}},
		{name: "narrower", make: layered("cluster_size=512,refcount_bits=64"), o: qcow.AmendOptions{RefcountBits: 2}},
		{name: "features", make: layered("cluster_size=64k,lazy_refcounts=on"), o: qcow.AmendOptions{LazyRefcounts: &no}},
		{name: "new key", make: encrypted, passphrases: []string{secret}, o: qcow.AmendOptions{
			Passphrase: []byte(secret), AddPassphrase: []byte("second"), KeyOptions: quick,
		}},
		{name: "other key", make: encrypted, passphrases: []string{secret, "second"}, o: qcow.AmendOptions{
			Passphrase: []byte(secret), AddPassphrase: []byte("second"), KeyOptions: quick, RemovePassphrase: []byte(secret), RefcountBits: 32,
		}},
	}
}

// shortenSnapshots takes the extra data out of the snapshot table of an image of version 2, which may lack it.
func (f *workshop) shortenSnapshots(name string) {
	f.t.Helper()
	b, err := os.ReadFile(f.path(name))
	if err != nil {
		f.t.Fatal(err)
	}
	h := f.header(name)
	list, _, err := format.DecodeSnapshots(b[h.SnapshotsOffset:], h.Snapshots)
	if err != nil {
		f.t.Fatal(err)
	}
	var table []byte
	for _, s := range list {
		table = append(table, make([]byte, -len(table)&7)...)
		whole := format.EncodeSnapshots([]format.Snapshot{s})
		const fixed, extra = 40, 24
		clear(whole[36:fixed]) // the length of the extra data
		table = append(append(table, whole[:fixed]...), whole[fixed+extra:]...)
	}
	f.patch(name, int64(h.SnapshotsOffset), table)
	f.check(name)
}

// An amended is an image in memory that is, was or may have been amended, and what it reads as.
type amended struct {
	amendCase
	f       *workshop
	initial []byte
	base    []byte
	header  *format.Header
	disk    []byte
	names   []string // of the snapshots
	kept    [][]byte // what they hold
}

func newAmended(t testing.TB, c amendCase) *amended {
	a := &amended{amendCase: c, f: newWorkshop(t)}
	c.make(a.f)
	for name, b := range map[string]*[]byte{"image": &a.initial, "base.qcow2": &a.base} {
		var err error
		if *b, err = os.ReadFile(a.f.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	a.header = a.f.header("image")
	img, err := a.open(a.initial, qcow.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range img.Snapshots() {
		a.names = append(a.names, s.Name)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if a.disk, a.kept, err = a.read(a.initial); err != nil {
		t.Fatal(err)
	}
	return a
}

// open opens an image with content, for writing into content.
func (a *amended) open(content []byte, o qcow.Options) (img *qcow.Image, err error) {
	o.Gate = func(r qcow.Reference) (qcow.Opened, error) {
		if r.Name != a.header.BackingFile {
			return qcow.Opened{}, fmt.Errorf("backing file %q", r.Name)
		}
		return qcow.Opened{File: storage.NewMemoryFrom(a.base), Format: r.Format}, nil
	}
	for _, p := range append(a.passphrases, "") {
		o.Passphrase = []byte(p)
		if img, err = qcow.Open(storage.NewMemoryFrom(content), o); err == nil || !errors.Is(err, qcow.ErrPassphrase) {
			return img, err
		}
	}
	return nil, err
}

// read reads the disk and the snapshots.
func (a *amended) read(content []byte) (disk []byte, kept [][]byte, err error) {
	for i := range len(a.names) + 1 {
		o := qcow.Options{ReadOnly: true}
		if i > 0 {
			o.Snapshot = a.names[i-1]
		}
		img, err := a.open(content, o)
		if err != nil {
			return nil, nil, err
		}
		b := make([]byte, img.Size())
		if _, err := img.ReadAt(b, 0); err != nil {
			return nil, nil, err
		}
		if err := img.Close(); err != nil {
			return nil, nil, err
		}
		if i == 0 {
			disk = b
		} else {
			kept = append(kept, b)
		}
	}
	return disk, kept, nil
}

// verify demands a clean image that is as before or as asked for in each respect, reads as before, and can be used.
func (a *amended) verify(content []byte) error {
	report, err := check.Check(a.f.t.Context(), storage.NewMemoryFrom(content), check.Options{})
	if err != nil {
		return err
	}
	if !report.Clean() {
		return fmt.Errorf("%v", report)
	}
	h, err := format.DecodeHeader(content)
	if err != nil {
		return err
	}
	if h.Version != a.header.Version && int(h.Version) != a.o.Version {
		return fmt.Errorf("version %d", h.Version)
	}
	if h.RefcountOrder != a.header.RefcountOrder && int(h.RefcountBits()) != a.o.RefcountBits {
		return fmt.Errorf("%d refcount bits", h.RefcountBits())
	}
	if err := a.compare(content, a.disk); err != nil {
		return err
	}
	return a.useAgain(bytes.Clone(content))
}

func (a *amended) compare(content, want []byte) error {
	disk, kept, err := a.read(content)
	if err != nil {
		return err
	}
	if i := firstDifference(disk, want); i >= 0 {
		return fmt.Errorf("byte %d of the disk is %#x", i, disk[i])
	}
	for s := range kept {
		if i := firstDifference(kept[s], a.kept[s]); i >= 0 {
			return fmt.Errorf("byte %d of snapshot %s is %#x", i, a.names[s], kept[s][i])
		}
	}
	return nil
}

// useAgain writes to an image, whose snapshots must not change by that.
func (a *amended) useAgain(content []byte) error {
	mem := storage.NewMemoryFrom(content)
	img, err := a.openFile(mem)
	if err != nil {
		return err
	}
	want := bytes.Clone(a.disk)
	for off := int64(512); off+3072 < img.Size(); off += 9 << 10 {
		copy(want[off:], repeated(0x77, 3072))
		if _, err := img.WriteAt(repeated(0x77, 3072), off); err != nil {
			return err
		}
	}
	if err := img.Close(); err != nil {
		return err
	}
	report, err := check.Check(a.f.t.Context(), mem, check.Options{})
	if err != nil || report.Corruptions > 0 {
		return fmt.Errorf("after further use: %w %v", err, report)
	}
	if err := a.compare(mem.Bytes(), want); err != nil {
		return fmt.Errorf("after further use: %w", err)
	}
	return nil
}

func (a *amended) openFile(f storage.File) (img *qcow.Image, err error) {
	gate := func(r qcow.Reference) (qcow.Opened, error) {
		return qcow.Opened{File: storage.NewMemoryFrom(a.base), Format: r.Format}, nil
	}
	for _, p := range append(a.passphrases, "") {
		if img, err = qcow.Open(f, qcow.Options{Gate: gate, Passphrase: []byte(p)}); err == nil || !errors.Is(err, qcow.ErrPassphrase) {
			return img, err
		}
	}
	return nil, err
}

// TestCrashAmend enumerates what a crash leaves of every amendment: a clean image, as before or as asked for, with the same content.
func TestCrashAmend(t *testing.T) {
	o := storage.CrashOptions{Seed: 1, Exhaustive: 8, Random: 96}
	if long() {
		o = storage.CrashOptions{Seed: 1, Random: 200}
	}
	total := 0
	for _, c := range amendCases() {
		t.Run(c.name, func(t *testing.T) {
			a := newAmended(t, c)
			rec := storage.NewRecorder(storage.NewMemoryFrom(bytes.Clone(a.initial)))
			if err := qcow.Amend(t.Context(), rec, c.o); err != nil {
				t.Fatal(err)
			}
			states, byQEMU := 0, 0
			for s := range storage.CrashStates(a.initial, rec.Ops(), o) {
				if states++; states%25 == 0 {
					byQEMU++
					if err := os.WriteFile(a.f.path("state"), s.Content, 0o600); err != nil {
						t.Fatal(err)
					}
					if len(c.passphrases) == 0 {
						a.f.run("qemu-img", "check", "-q", "-f", "qcow2", "state")
					}
				}
				if err := a.verify(s.Content); err != nil {
					t.Fatalf("%s: %v\n%s", s.Name, err, storage.Trace(rec.Ops()))
				}
			}
			total += states
			t.Logf("%d states, %d of them checked by QEMU", states, byQEMU)
		})
	}
	t.Logf("%d states", total)
}

// TestFaultAmend lets the k-th change of the file fail: Amend says so, the image is clean, as before or as asked for, and reads the
// same.
func TestFaultAmend(t *testing.T) {
	for _, c := range amendCases() {
		t.Run(c.name, func(t *testing.T) {
			a := newAmended(t, c)
			injected := 0
			for _, fault := range []storage.Fault{
				{Err: syscall.EIO},
				{Err: syscall.EIO, Forever: true},
				{Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC), Short: true},
				{Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC), Short: true, Forever: true},
			} {
				for at := 0; ; at++ {
					fault.At = at
					mem := storage.NewMemoryFrom(bytes.Clone(a.initial))
					faults := storage.NewFaults(mem, &fault)
					err := qcow.Amend(t.Context(), faults, c.o)
					_, n := faults.Count()
					if err != nil && !errors.Is(err, fault.Err) {
						t.Fatalf("fault %d: %v", at, err)
					}
					if err := a.verify(mem.Bytes()); err != nil {
						t.Fatalf("fault %d, %+v: %v", at, fault, err)
					}
					if n == 0 {
						break
					}
					injected++
				}
			}
			t.Logf("%d faults", injected)
		})
	}
}

package interop_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// equal returns an error unless got is what the disk should hold.
func (d disk) equal(got []byte) error {
	if bytes.Equal(got, d) {
		return nil
	}
	for i := range min(len(d), len(got)) {
		if d[i] != got[i] {
			return fmt.Errorf("byte %#x (sector %d) is %#x, want %#x", i, i/512, got[i], d[i])
		}
	}
	return fmt.Errorf("%d bytes, want %d", len(got), len(d))
}

// readsHere reads the image with the engine: the disk, every snapshot, and what the bitmaps say.
func (s *subject) readsHere() error {
	if err := s.checksHere(); err != nil {
		return err
	}
	img, err := s.openImage(qcow.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	err = errors.Join(s.disk.equalImage(img), s.bitmapsHold(img), s.describes(img), img.Close())
	if err != nil {
		return fmt.Errorf("the engine: %w", err)
	}
	for _, k := range s.snapshots {
		img, err := s.openImage(qcow.Options{ReadOnly: true, Snapshot: k.name})
		if err != nil {
			return fmt.Errorf("open snapshot %s: %w", k.name, err)
		}
		if err := errors.Join(k.disk.equalImage(img), img.Close()); err != nil {
			return fmt.Errorf("the engine, snapshot %s: %w", k.name, err)
		}
	}
	if s.c.is(byData, "raw") && !s.encrypted() {
		raw, err := os.ReadFile(s.path(s.dataFile()))
		if err != nil {
			return err
		}
		if err := s.disk.equal(raw[:min(len(raw), len(s.disk))]); err != nil {
			return fmt.Errorf("the raw data file: %w", err)
		}
	}
	return nil
}

func (d disk) equalImage(img *qcow.Image) error {
	if img.Size() != int64(len(d)) {
		return fmt.Errorf("the disk has %d bytes, want %d", img.Size(), len(d))
	}
	got := make([]byte, len(d))
	if _, err := img.ReadAt(got, 0); err != nil {
		return err
	}
	return d.equal(got)
}

// describes holds what the image says of itself against what was asked for.
func (s *subject) describes(img *qcow.Image) error {
	is := img.Info()
	want := is // what is not compared is equal
	want.Version, want.VirtualSize, want.ClusterSize, want.RefcountBits = s.version, int64(len(s.disk)), int(s.cluster()), s.refcountBits
	want.LazyRefcounts, want.ExtendedL2, want.CompressionType = s.lazy, s.c.is(byExtended, "on"), s.compressionType()
	want.Encryption = strings.TrimPrefix(s.c.value(byEncryption), "none")
	want.DataFileRaw, want.Snapshots, want.Bitmaps = s.c.is(byData, "raw"), len(s.snapshots), len(s.bitmaps)
	want.BitmapsIgnored, want.Dirty, want.Corrupt = false, false, false
	want.BackingFormat = ""
	if s.backing != nil {
		want.BackingFormat = s.backing.format
	}
	if is != want {
		return fmt.Errorf("the image says %+v, want %+v", is, want)
	}
	return nil
}

// bitmapsHold holds the bitmaps against what was written.
func (s *subject) bitmapsHold(img *qcow.Image) error {
	list, err := img.Bitmaps()
	if err != nil {
		return err
	}
	for _, d := range s.bitmaps {
		i := slices.IndexFunc(list, func(b qcow.BitmapInfo) bool { return b.Name == d.name })
		if i < 0 {
			return fmt.Errorf("bitmap %s is gone", d.name)
		}
		want := qcow.BitmapInfo{Name: d.name, Granularity: d.granularity, Enabled: !d.disabled, Persistent: true, Count: list[i].Count}
		if list[i] != want {
			return fmt.Errorf("bitmap %+v, want %+v", list[i], want)
		}
		bits, err := dirtyBits(img, d)
		if err == nil {
			err = d.holds(bits)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func dirtyBits(img *qcow.Image, d *dirty) ([]bool, error) {
	got := dirty{granularity: d.granularity}
	got.resize(img.Size())
	for e, err := range img.DirtyExtents(d.name, 0, img.Size()) {
		if err != nil {
			return nil, err
		}
		got.set(got.must, e.Offset, e.Length)
	}
	return got.must, nil
}

// checksHere checks the image with package check.
func (s *subject) checksHere() error {
	f, err := s.b.open(s.name, storage.ReadOnly)
	if err != nil {
		return err
	}
	report, err := check.Check(context.Background(), f, check.Options{})
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if !report.Clean() {
		return fmt.Errorf("check: %v", report)
	}
	return nil
}

// checksThere checks the image with QEMU, which says by its status whether anything is corrupt, or leaked.
func (s *subject) checksThere() error {
	_, err := theirs{s}.img("check", []string{"-q"})
	return err
}

// readsThere reads the image with QEMU: the disk, which it compares or converts by turns, and every snapshot.
func (s *subject) readsThere() error {
	if err := s.checksThere(); err != nil {
		return err
	}
	if s.rng.IntN(2) == 0 {
		if err := s.comparesThere(); err != nil {
			return err
		}
	} else if err := s.convertsThere(s.disk); err != nil {
		return err
	}
	for _, k := range s.snapshots {
		if err := s.convertsThere(k.disk, "-l", "snapshot.name="+k.name); err != nil {
			return fmt.Errorf("snapshot %s: %w", k.name, err)
		}
	}
	return nil
}

func (s *subject) comparesThere() error {
	raw := s.name + ".raw"
	if err := os.WriteFile(s.path(raw), s.disk, 0o600); err != nil {
		return err
	}
	_, err := theirs{s}.img("compare", nil, "driver=raw,file.driver=file,file.filename="+raw)
	return err
}

func (s *subject) convertsThere(d disk, options ...string) error {
	out := s.name + ".out"
	if _, err := (theirs{s}).img("convert", slices.Concat(options, []string{"-O", "raw"}), out); err != nil {
		return err
	}
	got, err := os.ReadFile(s.path(out))
	if err == nil && len(options) > 0 { // to QEMU a snapshot is as long as the disk is now
		n := min(len(got), len(d))
		got, d = got[:n], d[:n]
	}
	if err == nil {
		err = d.equal(got)
	}
	if err != nil {
		return fmt.Errorf("qemu-img convert %v: %w", options, err)
	}
	return nil
}

// mapped is an element of qemu-img map --output=json, and of the same by the engine.
type mapped struct {
	Start, Length       int64
	Depth               int
	Present, Zero, Data bool
	Offset              int64
}

// joinMapped joins neighbours that say the same, and drops what only QEMU says: see join. Of a raw backing file it keeps where it is.
func (s *subject) joinMapped(list []mapped) []mapped {
	var joined []mapped
	for _, e := range list {
		switch {
		case s.depthOfRaw() == e.Depth:
			e.Present, e.Zero, e.Data, e.Offset = true, false, false, 0
		case e.Data:
			e.Zero = false
		default:
			e.Offset = 0
		}
		if n := len(joined); n > 0 {
			last := &joined[n-1]
			if last.Depth == e.Depth && last.Present == e.Present && last.Zero == e.Zero && last.Data == e.Data && (e.Offset == 0 && last.Offset == 0 || last.Offset+last.Length == e.Offset) {
				last.Length += e.Length
				continue
			}
		}
		joined = append(joined, e)
	}
	return joined
}

// depthOfRaw returns how deep in the chain a raw file is, or -1.
func (s *subject) depthOfRaw() int {
	depth := 1
	for b := s.backing; b != nil; b = b.backing {
		if b.format == "raw" {
			return depth
		}
		depth++
	}
	return -1
}

// mapsAlike compares Extents with qemu-img map.
func (s *subject) mapsAlike() error {
	var want, got []mapped
	out, err := theirs{s}.img("map", []string{"--output=json"})
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), &want); err != nil {
		return err
	}
	img, err := s.openImage(qcow.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	for e, extentErr := range img.Extents(0, img.Size()) {
		err = errors.Join(err, extentErr)
		m := mapped{Start: e.Offset, Length: e.Length, Depth: e.Depth, Present: e.Kind != qcow.ExtentUnallocated}
		m.Data = e.Kind == qcow.ExtentData || e.Kind == qcow.ExtentCompressed
		m.Zero = !m.Data
		if e.Kind == qcow.ExtentData && (e.Depth > 0 || !s.encrypted()) { // QEMU says where data is only if it is stored as it is
			m.Offset = int64(e.Host)
		}
		got = append(got, m)
	}
	if err := errors.Join(err, img.Close()); err != nil {
		return err
	}
	if g, w := fmt.Sprint(s.joinMapped(got)), fmt.Sprint(s.joinMapped(want)); g != w {
		return fmt.Errorf("extents:      %s\nqemu-img map: %s", g, w)
	}
	return nil
}

// bitmapsReadAlike compares what a bitmap says here with what it says to QEMU, which gives out only such as do not record.
func (s *subject) bitmapsReadAlike() error {
	q, d := theirs{s}, s.bitmaps[s.rng.IntN(len(s.bitmaps))]
	if !d.disabled {
		if err := q.change("bitmap", []string{"--disable"}, d.name); err != nil {
			return err
		}
	}
	args := slices.Concat([]string{"--map=qemu:dirty-bitmap:" + d.name, "--", "[", "qemu-nbd", "-r"}, secretObject, []string{"--image-opts", "-B", d.name, s.spec(), "]"})
	out, err := q.run("nbdinfo", args...)
	if err != nil {
		return err
	}
	want := dirty{granularity: d.granularity}
	want.resize(int64(len(s.disk)))
	for line := range strings.Lines(out) {
		var numbers [3]int64
		fields := strings.Fields(line)
		for i := range numbers {
			if numbers[i], err = strconv.ParseInt(fields[i], 10, 64); err != nil {
				return err
			}
		}
		if numbers[2] == 1 {
			want.set(want.must, numbers[0], numbers[1])
		}
	}
	img, err := s.openImage(qcow.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	got, err := dirtyBits(img, d)
	if err := errors.Join(err, img.Close()); err != nil {
		return err
	}
	if !slices.Equal(got, want.must) {
		return fmt.Errorf("bitmap %s says\n%t here, and to QEMU\n%t", d.name, got, want.must)
	}
	if !d.disabled {
		return q.change("bitmap", []string{"--enable"}, d.name)
	}
	return nil
}

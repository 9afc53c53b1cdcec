package qcow_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// model is an image and what must be in it.
type model struct {
	ctx     context.Context
	kind    modelKind
	files   files
	img     *qcow.Image
	journal *memoryJournal // nil: there is none
	cluster int64
	disks
	made    int // snapshots, so far
	bitmaps []*modelBitmap

	pool     []modelFile
	chain    []string // the names of the backing files, the image's own one first
	writable int      // the depth of the one that Commit may write into; 0: none

	version, width int
	lazy           bool
	zstd           bool // how clusters are compressed
	raw            bool // the data file is a raw image
	another        bool // there is another passphrase

	kills bool
	leaky map[string]bool // these files have leaks of a kill
}

func newModel(ctx context.Context, s *modelStart, kills bool) *model {
	o := s.kind.o
	m := &model{
		ctx: ctx, kind: s.kind, files: s.open(), kills: kills, leaky: map[string]bool{}, pool: slices.Clone(s.pool),
		disks: disks{want: bytes.Clone(s.want)}, cluster: int64(o.ClusterSize), version: o.Version, width: o.RefcountBits, lazy: o.LazyRefcounts,
		zstd: o.Compression != 0, raw: o.DataFileRaw,
	}
	if m.cluster == 0 {
		m.cluster = 64 << 10
	}
	if m.version == 0 {
		m.version = 3
	}
	if m.width == 0 {
		m.width = 16
	}
	m.chain = m.chainFrom(s.chain)
	if s.kind.journal {
		m.journal = newJournal(40)
	}
	return m
}

// file returns the image's own file.
func (m *model) file() *storage.Memory { return m.files[modelImage].(*storage.Memory) }

func (m *model) options() qcow.Options {
	return qcow.Options{Gate: m.files.gate, Passphrase: []byte(passphrase), CacheBytes: 1}
}

// open opens the image, and with it perhaps a backing file to be written into.
func (m *model) open(a uint64) (err error) {
	o := m.options()
	o.ReserveBytes = 32 << (a % 16)
	o.DetectZeroes = a>>8%3 == 0
	if m.writable = 0; a>>16%2 == 0 && len(m.chain) > 0 {
		m.writable = 1 + int(a>>17%uint64(len(m.chain)))
		o.CommitDepth = m.writable
	}
	if m.journal != nil {
		o.Journal = m.journal
	}
	m.img, err = qcow.OpenContext(m.ctx, m.file(), o)
	return err
}

// close closes the image, which must leave every file without any finding but leaks of an earlier kill.
func (m *model) close() error {
	if err := m.img.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	m.dropTransient()
	for _, name := range m.images() {
		report, err := check.Check(m.ctx, m.files[name], check.Options{})
		if err != nil {
			return err
		}
		if report.Corruptions > 0 || report.Leaks > 0 && !m.leaky[name] {
			return fmt.Errorf("%s after close: %v", name, report.Findings)
		}
	}
	return nil
}

func (m *model) reopen(a, _ uint64) error {
	if err := m.close(); err != nil {
		return err
	}
	return m.open(a)
}

// images returns the names of the files that are images and may have been written to.
func (m *model) images() []string {
	list := []string{modelImage}
	for _, f := range m.pool {
		if f.format == "qcow2" {
			list = append(list, f.name)
		}
	}
	return list
}

// kill goes on with the bytes that are in the files now.
func (m *model) kill(a, b uint64) error {
	if !m.kills {
		return m.reopen(a, b)
	}
	left := m.img
	if m.journal != nil { // before the files: what is settled meanwhile is in both
		m.journal = m.journal.copied()
	}
	m.files = m.files.copied()
	m.leaky[modelImage] = true
	if m.writable > 0 {
		m.leaky[m.chain[m.writable-1]] = true
	}
	m.killBitmaps()
	if err := m.check(); err != nil {
		return fmt.Errorf("after a kill: %w", err)
	}
	if err := m.open(a); err != nil {
		return err
	}
	if r := m.img.Restored(); r.Lost > 0 {
		return fmt.Errorf("after a kill: %+v", r)
	}
	if err := left.Close(); err != nil { // what was killed has files of its own now
		return fmt.Errorf("close what was left: %w", err)
	}
	return m.compare()
}

// check looks at the files as they are now: at worst clusters are allocated that no table mentions.
func (m *model) check() error {
	for _, name := range m.images() {
		report, err := check.Check(m.ctx, storage.NewMemoryFrom(m.files[name].(*storage.Memory).Bytes()), check.Options{})
		if err != nil {
			return err
		}
		if report.Corruptions > 0 {
			return fmt.Errorf("%s: %v", name, report.Findings)
		}
	}
	return nil
}

func (m *model) repairStep(a, b uint64) error {
	if err := m.close(); err != nil {
		return err
	}
	if err := m.repair(a); err != nil {
		return err
	}
	if err := m.open(b); err != nil {
		return err
	}
	return m.compare()
}

// repair repairs leaks, or everything, of the files at rest, which leaves those alone that have no leaks.
func (m *model) repair(a uint64) error {
	o := repair.Options{Mode: repair.Leaks}
	if a%2 == 1 {
		o.Mode = repair.All
	}
	for _, name := range m.images() {
		f := m.files[name].(*storage.Memory)
		before := f.Bytes()
		report, err := repair.Run(m.ctx, f, o)
		switch {
		case err != nil:
			return fmt.Errorf("repair %s: %w", name, err)
		case report.Lost() > 0 || report.Raised() > 0 || report.Corrected() > 0 && report.Leaks() == 0:
			return fmt.Errorf("repair of %s: %v", name, report)
		case !m.leaky[name] && (!report.Clean() || !bytes.Equal(before, f.Bytes())):
			return fmt.Errorf("repair of %s, which is in order: %v", name, report)
		}
		after, err := check.Check(m.ctx, f, check.Options{})
		if err != nil {
			return err
		}
		if !after.Clean() {
			return fmt.Errorf("%s after repair: %v", name, after.Findings)
		}
		m.leaky[name] = false
	}
	return nil
}

// compare holds everything against the model: what the image says, and what is in its file at this moment.
func (m *model) compare() error {
	if err := holds(m.img, m.want); err != nil {
		return err
	}
	for _, compare := range []func() error{m.compareFile, m.compareExtents, m.compareInfo, m.compareBitmaps, m.comparePool} {
		if err := compare(); err != nil {
			return err
		}
	}
	return nil
}

// compareFile reads all disks from the file as it is, and from the journal.
func (m *model) compareFile() error {
	o, file := m.options(), m.file()
	o.ReadOnly = true
	if m.journal != nil { // before the files: what is settled meanwhile is in both
		o.Journal, o.ReadOnly = m.journal.copied(), false
		left := m.files.copied()
		o.Gate, file = left.gate, left[modelImage].(*storage.Memory)
	}
	img, err := qcow.Open(file, o)
	if err != nil {
		return err
	}
	list := img.Snapshots()
	if len(list) != len(m.kept) {
		return fmt.Errorf("%d snapshots instead of %d", len(list), len(m.kept))
	}
	if err := holds(img, m.want); err != nil {
		return fmt.Errorf("in the file: %w", err)
	}
	for i, k := range m.kept {
		if list[i].Name != k.name {
			return fmt.Errorf("snapshot %d is %q instead of %q", i, list[i].Name, k.name)
		}
		if err := m.holdsSnapshot(k); err != nil {
			return err
		}
	}
	if data := m.files[modelData]; data != nil && m.raw && !m.kind.luks {
		return m.compareRaw(data.(*storage.Memory).Bytes())
	}
	return nil
}

func (m *model) holdsSnapshot(k keptDisk) error {
	o := m.options()
	o.ReadOnly, o.Snapshot = true, k.name
	img, err := qcow.Open(m.file(), o)
	if err != nil {
		return err
	}
	if err := holds(img, k.content); err != nil {
		return fmt.Errorf("snapshot %q: %w", k.name, err)
	}
	return nil
}

// compareRaw holds a data file that is a raw image against the disk.
func (m *model) compareRaw(data []byte) error {
	if len(data) != len(m.want) {
		return fmt.Errorf("the data file has %d bytes, the disk %d", len(data), len(m.want))
	}
	if i := firstDifference(data, m.want); i >= 0 {
		return fmt.Errorf("byte %d of the data file is %#x instead of %#x", i, data[i], m.want[i])
	}
	return nil
}

// compareExtents expects that extents are all of the disk, and hold no data where they say so.
func (m *model) compareExtents() error {
	length, err := m.file().Size()
	if err != nil {
		return err
	}
	at := int64(0)
	for e, err := range m.img.Extents(0, m.img.Size()) {
		if err != nil {
			return err
		}
		if e.Offset != at || e.Length <= 0 || e.Offset+e.Length > int64(len(m.want)) || e.Depth > len(m.chain) {
			return fmt.Errorf("extent %+v, at %d of %d, in a chain of %d", e, at, len(m.want), len(m.chain))
		}
		at += e.Length
		stored := e.Kind == qcow.ExtentData || e.Kind == qcow.ExtentCompressed
		if part := m.want[e.Offset:][:e.Length]; !stored && !bytes.Equal(part, make([]byte, len(part))) {
			return fmt.Errorf("extent %+v holds data", e)
		}
		if e.Kind == qcow.ExtentData && e.Depth == 0 && !m.kind.external && (e.Host == 0 || e.Host > format.HostOffset(length)) {
			return fmt.Errorf("extent %+v is not in the file of %d bytes", e, length)
		}
	}
	if at != int64(len(m.want)) {
		return fmt.Errorf("extents up to %d of %d", at, len(m.want))
	}
	return nil
}

// compareInfo expects that the header says what was asked for.
func (m *model) compareInfo() error {
	type said struct {
		version, width, snapshots, bitmaps   int
		size                                 int64
		lazy, extended, raw, bad             bool
		compression, backing, format, crypto string
	}
	i := m.img.Info()
	got := said{
		i.Version, i.RefcountBits, i.Snapshots, i.Bitmaps, i.VirtualSize, i.LazyRefcounts, i.ExtendedL2, i.DataFileRaw, i.Dirty || i.Corrupt || i.BitmapsIgnored,
		i.CompressionType, i.BackingFile, i.BackingFormat, i.Encryption,
	}
	want := said{m.version, m.width, len(m.kept), m.persistentBitmaps(), int64(len(m.want)), m.lazy, m.kind.o.ExtendedL2, m.raw, false, "zlib", "", "", ""}
	if m.zstd {
		want.compression = "zstd"
	}
	if m.kind.luks {
		want.crypto = "luks"
	}
	if len(m.chain) > 0 {
		want.backing, want.format = m.chain[0], m.inPool(m.chain[0]).format
	}
	if got != want {
		return fmt.Errorf("info %+v\nwant %+v", got, want)
	}
	var chain []string
	for _, c := range m.img.Chain() {
		if f := m.inPool(c.Name); c.Format != f.format || c.Size != int64(len(f.content)) {
			return fmt.Errorf("%+v in the chain; it is %s and has %d bytes", c, f.format, len(f.content))
		}
		chain = append(chain, c.Name)
	}
	if !slices.Equal(chain, m.chain) {
		return fmt.Errorf("the chain is %q instead of %q", chain, m.chain)
	}
	return nil
}

// refused holds the error of an operation that must be refused against the class that it must have, or must be nil.
func refused(err, class error) error {
	if class == nil {
		return err
	}
	if !errors.Is(err, class) {
		return fmt.Errorf("the error is %w, and must be %w", errorOrNone(err), class)
	}
	return nil
}

func errorOrNone(err error) error {
	if err == nil {
		return errors.New("none")
	}
	return err
}

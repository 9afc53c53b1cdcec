package interop_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// A subject is an image of a matrix, and what is known of it without looking at it: what was asked for.
type subject struct {
	t     *testing.T
	b     *bench
	c     combination
	rng   *rand.Rand
	name  string // of the file, in the folder of the bench
	lines []string
	bases []*base // that it has used

	version, refcountBits int
	lazy                  bool
	backing               *base // nil: none
	disk                  disk
	snapshots             []kept
	bitmaps               []*dirty
}

// kept is the content of an internal snapshot.
type kept struct {
	name string
	disk disk
}

// An author is a program that makes and changes the image of a subject.
type author interface {
	create() error
	send(list []request) error
	snapshot(name string) error
	apply(name string) error
	remove(name string) error
	addBitmap(d *dirty) error
	resize(size int64) error
	amend(a amendment) error
	rebase(to *base) error // to nothing, if nil
	compact() error
	stream() error
	done() error // with this turn
}

// say adds a line to the report of a failure.
func (s *subject) say(format string, args ...any) {
	s.lines = append(s.lines, fmt.Sprintf(format, args...))
}

// report tells how to make the image again.
func (s *subject) report() string {
	lines := []string{"QCOW_CSI_SEED=" + fmt.Sprint(s.b.seed), "# " + s.c.String(), "# in an empty folder:"}
	for _, i := range inks() {
		lines = append(lines, i.command)
	}
	for _, b := range s.bases {
		if b.backing != nil {
			lines = append(lines, b.backing.lines...)
		}
		lines = append(lines, b.lines...)
	}
	return strings.Join(append(lines, s.lines...), "\n")
}

// size returns how long the disk is at first.
func (c combination) size() int64 {
	cluster := int64(c.number(byCluster))
	size := max(8*cluster, min(32*cluster, 2<<20), 1<<20)
	if c.is(bySize, "ragged") {
		size += cluster/2&^511 | 512
	}
	return size
}

// cluster returns the size of a cluster.
func (s *subject) cluster() int64 { return int64(s.c.number(byCluster)) }

func (s *subject) encrypted() bool { return !s.c.is(byEncryption, "none") }

// grown returns a size that the disk may grow to.
func (s *subject) grown() int64 {
	return s.rounded(int64(len(s.disk)) + max(2*s.cluster(), 96<<10) + s.rng.Int64N(s.cluster()))
}

// shrunk returns a size that the disk may shrink to.
func (s *subject) shrunk() int64 {
	n := int64(len(s.disk))
	return min(s.rounded(n/2+s.rng.Int64N(n/4)), n-512)
}

// rounded returns a size of whole clusters, or of none.
func (s *subject) rounded(size int64) int64 {
	if s.c.is(bySize, "whole") {
		return (size + s.cluster() - 1) / s.cluster() * s.cluster()
	}
	if size &^= 511; size%s.cluster() == 0 {
		size += 512
	}
	return size
}

// find returns the place of the snapshot with a name.
func (s *subject) find(name string) int {
	return slices.IndexFunc(s.snapshots, func(k kept) bool { return k.name == name })
}

// The following do something to the image and to what is known of it.

func (s *subject) send(by author, list []request) error {
	if err := by.send(list); err != nil {
		return err
	}
	for _, r := range list {
		s.note(r)
	}
	return nil
}

func (s *subject) snapshot(by author, name string) error {
	if err := by.snapshot(name); err != nil {
		return fmt.Errorf("create snapshot: %w", err)
	}
	s.snapshots = append(s.snapshots, kept{name, bytes.Clone(s.disk)})
	return nil
}

func (s *subject) remove(by author, name string) error {
	if err := by.remove(name); err != nil {
		return fmt.Errorf("delete snapshot: %w", err)
	}
	i := s.find(name)
	s.snapshots = slices.Delete(s.snapshots, i, i+1)
	return nil
}

func (s *subject) apply(by author, name string) error {
	if err := by.apply(name); err != nil {
		return fmt.Errorf("apply snapshot: %w", err)
	}
	was := s.disk
	s.disk = bytes.Clone(s.snapshots[s.find(name)].disk)
	for _, d := range s.bitmaps {
		d.resize(int64(len(s.disk)))
		d.differ(was, s.disk)
	}
	return nil
}

func (s *subject) addBitmap(by author, d *dirty) error {
	if err := by.addBitmap(d); err != nil {
		return fmt.Errorf("add bitmap: %w", err)
	}
	d.resize(int64(len(s.disk)))
	s.bitmaps = append(s.bitmaps, d)
	return nil
}

func (s *subject) resize(by author, size int64) error {
	if err := by.resize(size); err != nil {
		return fmt.Errorf("resize: %w", err)
	}
	was := int64(len(s.disk))
	if size < was {
		s.disk = s.disk[:size]
	} else {
		s.disk = append(s.disk, make([]byte, size-was)...)
	}
	for _, d := range s.bitmaps {
		d.resize(size)
		d.mayBe(was, size-was)
	}
	return nil
}

func (s *subject) amend(by author, a amendment) error {
	if err := by.amend(a); err != nil {
		return fmt.Errorf("amend: %w", err)
	}
	if a.version != 0 {
		s.version = a.version
	}
	if a.refcountBits != 0 {
		s.refcountBits = a.refcountBits
	}
	if a.toggleLazy {
		s.lazy = !s.lazy
	}
	return nil
}

// rebase puts another backing file behind the image, or none: every cluster may be copied, and recorded as changed.
func (s *subject) rebase(by author, to *base) error {
	if to != nil {
		s.bases = append(s.bases, to)
	}
	if err := by.rebase(to); err != nil {
		return fmt.Errorf("rebase: %w", err)
	}
	s.backing = to
	s.allMayBeDirty()
	return nil
}

func (s *subject) stream(by author) error {
	if err := by.stream(); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	s.backing = nil
	s.allMayBeDirty()
	return nil
}

func (s *subject) allMayBeDirty() {
	for _, d := range s.bitmaps {
		d.mayBe(0, int64(len(s.disk)))
	}
}

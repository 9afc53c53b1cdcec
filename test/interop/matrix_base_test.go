package interop_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
)

// A base is a backing file.
type base struct {
	*subject
	format string
}

// base returns the backing file of a kind for a disk of a size. Nobody writes to it once it is made.
func (b *bench) base(kind string, size int64) (*base, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.baseLocked(kind, size)
}

func (b *bench) baseLocked(kind string, size int64) (*base, error) {
	name := fmt.Sprintf("%s-%d", kind, size)
	if found := b.bases[name]; found != nil {
		return found, nil
	}
	rng := rand.New(rand.NewPCG(b.seed, uint64(size)))
	c, _ := b.matrix.undecided().complete(nil)
	s := b.subject(name, c, rng)
	made := &base{subject: s, format: "qcow2"}
	s.disk = make(disk, size)
	var err error
	switch kind {
	case "raw":
		made.format = "raw"
		err = s.makeRaw()
	case "short":
		s.disk = s.disk[:size/2&^511]
	case "two":
		s.disk = s.disk[:size*3/4&^511]
		if s.backing, err = b.baseLocked("qcow2", size+64<<10); err == nil {
			copy(s.disk, s.backing.disk)
		}
	case "qcow2":
		c.at[byCluster] = int8(len(b.bases) % 5)
		c.at[byCompression] = int8(len(b.bases) % 3)
		s.c = c
	}
	if err == nil && made.format == "qcow2" {
		err = s.makeBase()
	}
	if err != nil {
		return nil, fmt.Errorf("backing file %s: %w", name, err)
	}
	b.bases[name] = made
	return made, nil
}

// makeRaw makes a raw file of data and holes.
func (s *subject) makeRaw() error {
	f, err := os.Create(s.path(s.name))
	if err != nil {
		return err
	}
	err = f.Truncate(int64(len(s.disk)))
	s.say("truncate -s %d %s", len(s.disk), s.name)
	for _, r := range s.requests(12, plainWrite) {
		s.note(r)
		_, writeErr := f.WriteAt(s.disk[r.off:r.off+r.n], r.off)
		err = errors.Join(err, writeErr)
		s.say("qemu-io -f raw -c '%v' %s", r, s.name)
	}
	return errors.Join(err, f.Close())
}

// makeBase has the first author make an image.
func (s *subject) makeBase() error {
	by := s.b.first(s)
	err := by.create()
	if err == nil {
		err = s.send(by, slices.Concat(s.firstRequests(), s.requests(12, plainWrite, plainWrite, plainWrite, zeroKept, zeroUnmapped)))
	}
	return errors.Join(err, by.done())
}

package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"path"
	"time"
	"unicode/utf8"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// DefaultClusterSize is the cluster size of a volume whose Spec names none, in bytes.
const DefaultClusterSize = 1 << format.DefaultClusterBits

// MaxNameLength bounds the name of a volume, in bytes.
const MaxNameLength = 128

// Spec says what volume to create.
type Spec struct {
	Name           string // 1 to 128 bytes of UTF-8
	Size           SizeRange
	ClusterSize    int    // bytes, a power of two from 512 to 2 MiB; 0 means DefaultClusterSize
	FilesystemType string // kept with the volume for whoever mounts it; may be empty
}

func (s *Spec) validate() error {
	if s.Name == "" || len(s.Name) > MaxNameLength || !utf8.ValidString(s.Name) {
		return fmt.Errorf("%w: a volume's name is 1 to %d bytes of UTF-8", ErrInvalid, MaxNameLength)
	}
	if s.ClusterSize == 0 {
		s.ClusterSize = DefaultClusterSize
	}
	const smallest, largest = 1 << format.MinClusterBits, 1 << format.MaxClusterBits
	if c := s.ClusterSize; c < smallest || c > largest || c&(c-1) != 0 {
		return fmt.Errorf("%w: cluster size %d is not a power of two from %d to %d", ErrInvalid, c, smallest, largest)
	}
	return s.Size.validate()
}

func (s *Spec) geometry() format.Geometry {
	clusterBits := bits.TrailingZeros(uint(s.ClusterSize))
	return format.Geometry{ClusterBits: uint32(clusterBits), RefcountOrder: format.DefaultRefcountOrder}
}

// match returns nil when the existing volume is what s asks for.
func (s *Spec) match(v Volume) error {
	switch {
	case !s.Size.contains(v.Size):
		return fmt.Errorf("%w: %q has %d bytes", ErrExists, s.Name, v.Size)
	case s.ClusterSize != v.ClusterSize:
		return fmt.Errorf("%w: %q has clusters of %d bytes", ErrExists, s.Name, v.ClusterSize)
	case s.FilesystemType != v.FilesystemType:
		return fmt.Errorf("%w: %q is for filesystem %q", ErrExists, s.Name, v.FilesystemType)
	}
	return nil
}

// Create makes a volume. When one of that name exists it returns that one if it is what s asks for, and fails with
// ErrExists if not. ErrNoSpace: the volume's footprint does not fit into what is not promised yet; ErrOutOfRange: no
// size fits.
func (p *Pool) Create(ctx context.Context, s Spec) (Volume, error) {
	if err := s.validate(); err != nil {
		return Volume{}, err
	}
	if err := p.begin(ctx); err != nil {
		return Volume{}, err
	}
	defer p.running.Done()
	for {
		existing, release, err := p.claim(ctx, s.Name)
		if err != nil {
			return Volume{}, err
		}
		if existing == nil {
			defer release() //nolint:revive // the loop ends here
			return p.make(s)
		}
		v, err := p.Get(ctx, existing.id)
		if errors.Is(err, ErrNotFound) { // deleted meanwhile
			continue
		}
		return v, cmp.Or(err, s.match(v))
	}
}

// make makes a volume whose name the caller has claimed.
func (p *Pool) make(s Spec) (Volume, error) {
	g := s.geometry()
	size, err := s.Size.choose(g)
	if err != nil {
		return Volume{}, err
	}
	promised := footprint(size, g)
	if err := p.promise(&p.pending, promised); err != nil {
		return Volume{}, fmt.Errorf("volume %q of %d bytes: %w", s.Name, size, err)
	}
	v := newVolume(newVolumeID(s.Name))
	v.rec = record{
		Version: recordVersion, ID: v.id, Name: s.Name, Created: time.Now().UTC().Truncate(time.Second), Head: headImage,
		FilesystemType: s.FilesystemType, Format: Format{State: NeverFormatted},
	}
	v.setSize(size, g)
	err = p.build(v)

	p.mu.Lock()
	defer p.mu.Unlock()
	p.pending -= promised
	if err != nil {
		return Volume{}, fmt.Errorf("volume %q: %w", s.Name, err)
	}
	p.volumes[v.id], p.names[s.Name] = v, v
	return v.view(), nil
}

// claim returns the volume of that name or, when there is none, makes the caller the only one who may create it until
// it calls release. It waits while another is creating it.
func (p *Pool) claim(ctx context.Context, name string) (_ *volume, release func(), err error) {
	for {
		p.mu.Lock()
		if v := p.names[name]; v != nil {
			p.mu.Unlock()
			return v, nil, nil
		}
		over := p.building[name]
		if over == nil {
			over = make(chan struct{})
			p.building[name] = over
			p.mu.Unlock()
			return nil, func() {
				p.mu.Lock()
				defer p.mu.Unlock()
				delete(p.building, name)
				close(over)
			}, nil
		}
		p.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
}

// build makes the files of a volume aside and puts them in place.
func (p *Pool) build(v *volume) (err error) {
	aside := p.aside(v)
	if err := p.dir.mkdir(aside); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.raze(v))
		}
	}()
	f, err := p.dir.create(path.Join(aside, v.rec.Head))
	if err != nil {
		return err
	}
	err = qcow.Create(f, qcow.CreateOptions{
		Size: v.size, ClusterSize: int(v.geometry.ClusterSize()), RefcountBits: int(v.geometry.RefcountBits()),
	})
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	b, err := encode(v.rec)
	if err != nil {
		return err
	}
	if err := p.dir.replace(path.Join(aside, volumeFile), b); err != nil {
		return err
	}
	return p.dir.move(aside, v.dir())
}

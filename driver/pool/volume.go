package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"sort"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Volume describes a volume at one moment.
type Volume struct {
	ID             string
	Name           string // as given to Create
	Size           int64  // virtual, in bytes
	ClusterSize    int    // bytes
	FilesystemType string // as given to Create
	Format         Format
	Created        time.Time
	Err            error // why the volume cannot be used; then only ID is certain
}

// volume is a volume in memory.
type volume struct {
	id   string
	turn chan struct{} // the volume's lock: full while an operation has it

	// Guarded by Pool.mu, and changed only by who also has the turn.
	rec      record
	geometry format.Geometry
	size     int64
	promised int64   // the footprint for the size, or for the one it is growing to
	live     *Handle // while the image is open
	fault    error   // why the volume cannot be used
	gone     bool
}

func newVolume(id string) *volume {
	return &volume{id: id, turn: make(chan struct{}, 1), rec: record{Head: headImage}}
}

func (v *volume) dir() string  { return path.Join(volumesDir, v.id) }
func (v *volume) file() string { return path.Join(v.dir(), volumeFile) }
func (v *volume) head() string { return path.Join(v.dir(), v.rec.Head) }

func (v *volume) view() Volume {
	d := Volume{
		ID: v.id, Name: v.rec.Name, Size: v.size, FilesystemType: v.rec.FilesystemType, Format: v.rec.Format,
		Created: v.rec.Created, Err: v.fault,
	}
	if v.fault == nil {
		d.ClusterSize = int(v.geometry.ClusterSize())
	}
	return d
}

// setSize notes the size of the image, and promises the space for it.
func (v *volume) setSize(size int64, g format.Geometry) {
	v.size, v.geometry, v.promised = size, g, footprint(size, g)
}

// load reads a volume from the directory.
func (p *Pool) load(v *volume) {
	v.fault = func() error {
		b, err := p.dir.read(v.file())
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: volume %s has no %s", ErrCorrupt, v.id, volumeFile)
		}
		if err != nil {
			return err
		}
		rec, err := decodeVolume(b, v.id)
		if err != nil {
			return err
		}
		v.rec = rec
		h, err := p.dir.header(v.head())
		if err != nil {
			return fmt.Errorf("volume %s: %w", v.id, err)
		}
		v.setSize(int64(h.Size), h.Geometry)
		return nil
	}()
}

// header reads the header of an image, which another process may have open.
func (d *directory) header(name string) (_ *format.Header, err error) {
	info, err := d.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: image %s is missing", ErrCorrupt, name)
	}
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: image %s is not a regular file", ErrCorrupt, name)
	}
	f, err := d.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b, err := io.ReadAll(io.LimitReader(f, 1<<format.DefaultClusterBits))
	if err != nil {
		return nil, err
	}
	return format.DecodeHeader(b)
}

// enter finds a volume and takes its turn, which ends with p.leave.
func (p *Pool) enter(ctx context.Context, id string) (*volume, error) {
	if err := p.begin(ctx); err != nil {
		return nil, err
	}
	v, err := p.take(ctx, id)
	if err != nil {
		p.running.Done()
		return nil, err
	}
	return v, nil
}

func (p *Pool) leave(v *volume) {
	<-v.turn
	p.running.Done()
}

func (p *Pool) take(ctx context.Context, id string) (*volume, error) {
	p.mu.Lock()
	v := p.volumes[id]
	p.mu.Unlock()
	if v == nil {
		return nil, fmt.Errorf("%w: %q", ErrNotFound, id)
	}
	select {
	case v.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if v.gone {
		<-v.turn
		return nil, fmt.Errorf("%w: %q", ErrNotFound, id)
	}
	return v, nil
}

// usable returns nil when the volume, whose turn the caller has, can be used. A damaged one is read again: it may have
// been repaired.
func (p *Pool) usable(v *volume) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if v.fault != nil && v.live == nil {
		p.load(v)
		p.index(v)
	}
	return v.fault
}

// Get describes a volume. ErrNotFound, or why it cannot be used.
func (p *Pool) Get(ctx context.Context, id string) (Volume, error) {
	v, err := p.enter(ctx, id)
	if err != nil {
		return Volume{}, err
	}
	defer p.leave(v)
	if err := p.usable(v); err != nil {
		return Volume{ID: id, Err: err}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return v.view(), nil
}

// List describes up to limit volumes, all when limit is 0, in the order of their ids, beginning behind the id after.
// Damaged ones are among them. It also tells whether there are more.
func (p *Pool) List(ctx context.Context, after string, limit int) (_ []Volume, more bool, err error) {
	if err := p.begin(ctx); err != nil {
		return nil, false, err
	}
	defer p.running.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := make([]string, 0, len(p.volumes))
	for id := range p.volumes {
		if id > after {
			ids = append(ids, id)
		}
	}
	sort.Strings(ids)
	if limit > 0 && len(ids) > limit {
		ids, more = ids[:limit], true
	}
	list := make([]Volume, len(ids))
	for i, id := range ids {
		list[i] = p.volumes[id].view()
	}
	return list, more, nil
}

package pool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Pool is a storage directory, served by this process. Its methods may be called concurrently.
type Pool struct {
	id   string
	dir  *directory
	lock *os.File

	journals *storage.Journals // nil: there are none

	mu       sync.Mutex // guards what follows and the marked fields of every volume
	closed   bool
	running  sync.WaitGroup // operations; added to under mu while not closed
	volumes  map[string]*volume
	names    map[string]*volume
	building map[string]chan struct{} // by name; closed when the creation is over
	pending  int64                    // bytes promised to volumes that are being built
}

// Open serves the storage directory dir, which must exist. An empty one becomes a pool. It removes what a crash has
// left half done, and reads all volumes; damaged ones are logged and kept. ErrBusy: another process serves it.
// ErrInvalid: it holds something else.
func Open(ctx context.Context, dir string, o Options) (*Pool, error) { return open(ctx, dir, o, nil) }

// Options say how to use a pool.
type Options struct {
	// Journals, unless nil, is where acknowledged writes are kept until they are durable, for the case that this process dies; see
	// [qcow.Options]. Without it they are made durable first.
	Journals *storage.Journals
}

func open(ctx context.Context, name string, o Options, step func(op, name string) error) (_ *Pool, err error) {
	dir, err := openDirectory(name)
	if err != nil {
		return nil, err
	}
	dir.step = step
	p := &Pool{dir: dir, journals: o.Journals, volumes: map[string]*volume{}, names: map[string]*volume{}, building: map[string]chan struct{}{}}
	if p.lock, err = dir.lock(); err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	if err := p.recover(ctx); err != nil {
		return nil, errors.Join(err, p.lock.Close(), dir.Close())
	}
	return p, nil
}

// recover reads the directory, and ends what a crash has left unfinished.
func (p *Pool) recover(ctx context.Context) error {
	b, err := p.dir.read(poolFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := p.found(); err != nil {
			return err
		}
	case err != nil:
		return fmt.Errorf("storage directory: %w", err)
	default:
		r, err := decodePool(b)
		if err != nil {
			return err
		}
		p.id = r.ID
	}
	if err := p.dir.mkdir(tmpDir); err != nil { // which not every backup keeps
		return fmt.Errorf("storage directory: %w", err)
	}
	leftovers, err := p.dir.list(tmpDir)
	if err != nil {
		return fmt.Errorf("storage directory: %w", err)
	}
	for _, e := range leftovers {
		klog.FromContext(ctx).Info("removing what an earlier process left unfinished", "name", e.Name())
		if err := p.dir.remove(path.Join(tmpDir, e.Name())); err != nil {
			return fmt.Errorf("storage directory: %w", err)
		}
	}
	return p.readVolumes(ctx)
}

// found makes the directory a pool. pool.json comes last: with it the pool exists.
func (p *Pool) found() error {
	if err := p.checkVacant(); err != nil {
		return err
	}
	p.id = newPoolID()
	b, err := encode(poolRecord{Version: recordVersion, ID: p.id})
	if err != nil {
		return err
	}
	if err := p.dir.mkdir(volumesDir); err != nil {
		return fmt.Errorf("new pool: %w", err)
	}
	if err := p.dir.replace(poolFile, b); err != nil {
		return fmt.Errorf("new pool: %w", err)
	}
	return nil
}

// checkVacant refuses a directory that holds volumes, whose handles a new pool id would invalidate, or anything else
// that is not ours.
func (p *Pool) checkVacant() error {
	entries, err := p.dir.list(".")
	if err != nil {
		return fmt.Errorf("storage directory: %w", err)
	}
	for _, e := range entries {
		switch name := e.Name(); {
		case name == volumesDir:
			volumes, err := p.dir.list(volumesDir)
			if err != nil {
				return fmt.Errorf("storage directory: %w", err)
			}
			if len(volumes) > 0 {
				return fmt.Errorf("%w: %s has volumes, but its %s is missing", ErrCorrupt, p.dir.path, poolFile)
			}
		case name == lockFile, name == tmpDir, name == poolFile+asideSuffix:
		case name == "lost+found", strings.HasPrefix(name, "."): // a filesystem's own
		default:
			return fmt.Errorf("%w: %s is not empty (%s) and holds no pool", ErrInvalid, p.dir.path, name)
		}
	}
	return nil
}

func (p *Pool) readVolumes(ctx context.Context) error {
	logger := klog.FromContext(ctx)
	entries, err := p.dir.list(volumesDir)
	if err != nil {
		return fmt.Errorf("storage directory: %w", err)
	}
	for _, e := range entries {
		if !e.IsDir() || !ValidID(e.Name()) {
			logger.Info("ignoring a stranger among the volumes", "name", e.Name())
			continue
		}
		v := newVolume(e.Name())
		p.load(v)
		p.volumes[v.id] = v
		if v.fault != nil {
			logger.Error(v.fault, "volume cannot be used until it is repaired", "volume", v.id)
		}
		if other := p.index(v); other != nil {
			logger.Info("two volumes of one name; requests by name mean the younger",
				"name", v.rec.Name, "volumes", []string{v.id, other.id})
		}
	}
	return nil
}

// index makes v known by its name, and returns another volume that has the same one.
func (p *Pool) index(v *volume) (other *volume) {
	if v.rec.Name == "" {
		return nil
	}
	other = p.names[v.rec.Name]
	if other == nil || other == v || other.rec.Created.Before(v.rec.Created) {
		p.names[v.rec.Name] = v
	}
	if other == v {
		return nil
	}
	return other
}

// ID returns the id of the pool.
func (p *Pool) ID() string { return p.id }

// Probe reports whether the directory is there and can be written to, as far as one can know without writing.
func (p *Pool) Probe(ctx context.Context) error {
	if err := p.begin(ctx); err != nil {
		return err
	}
	defer p.running.Done()
	if err := p.dir.inPlace(); err != nil {
		return err
	}
	b, err := p.dir.read(poolFile)
	if err != nil {
		return fmt.Errorf("storage directory: %w", err)
	}
	r, err := decodePool(b)
	if err != nil {
		return err
	}
	if r.ID != p.id {
		return fmt.Errorf("%w: storage directory %s now holds pool %s instead of %s", ErrInvalid, p.dir.path, r.ID, p.id)
	}
	if err := unix.Faccessat(unix.AT_FDCWD, p.dir.path, unix.W_OK, unix.AT_EACCESS); err != nil {
		return fmt.Errorf("storage directory %s: %w", p.dir.path, err)
	}
	return nil
}

// Close waits for running operations, flushes and closes every open image, and gives the directory up. Later calls fail
// with ErrClosed.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	p.running.Wait()

	var errs []error
	for _, id := range slices.Sorted(maps.Keys(p.volumes)) {
		v := p.volumes[id]
		v.turn <- struct{}{}
		errs = append(errs, p.closeImage(v))
		<-v.turn
	}
	return errors.Join(append(errs, p.lock.Close(), p.dir.Close())...)
}

// begin starts an operation, which ends with p.running.Done.
func (p *Pool) begin(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return ErrClosed
	}
	p.running.Add(1)
	return nil
}

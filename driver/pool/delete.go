package pool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Delete removes a volume with everything in it, a damaged one too; an absent one is fine. ErrBusy while its image is
// open, here or in another process.
func (p *Pool) Delete(ctx context.Context, id string) (err error) {
	v, err := p.enter(ctx, id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.leave(v)
	if v.live != nil {
		return fmt.Errorf("%w: volume %s is attached", ErrBusy, id)
	}
	// The lock keeps everyone else out until the image is out of reach.
	f, err := p.dir.open(v.head(), storage.ReadWrite)
	switch {
	case err == nil:
		defer func() { err = errors.Join(err, f.Close()) }()
	case errors.Is(err, ErrBusy):
		return err
	default: // damaged: nobody can be using it, and this is the one way to get rid of it
		klog.FromContext(ctx).Info("deleting a volume whose image cannot be opened", "volume", id, "reason", err.Error())
	}
	if err := p.dir.move(v.dir(), p.aside(v)); err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	p.forget(v)
	if p.journals != nil && f != nil {
		if err := p.journals.Remove(f); err != nil {
			klog.FromContext(ctx).Error(err, "journal of a deleted volume stays until the machine is booted", "volume", id)
		}
	}
	if err := p.dir.remove(p.aside(v)); err != nil {
		// The volume is gone for good. What is left of it goes when the directory is opened the next time.
		klog.FromContext(ctx).Error(err, "space of a deleted volume is not free yet", "volume", id)
	}
	return nil
}

// forget takes a removed volume out of the maps.
func (p *Pool) forget(v *volume) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v.gone = true
	delete(p.volumes, v.id)
	if p.names[v.rec.Name] == v {
		delete(p.names, v.rec.Name)
		for _, other := range p.volumes {
			if other.rec.Name == v.rec.Name {
				p.index(other)
			}
		}
	}
}

// aside returns where the files of a volume are before it exists and after it is gone.
func (p *Pool) aside(v *volume) string { return path.Join(tmpDir, v.id) }

// raze removes the files of a volume that came into being in part.
func (p *Pool) raze(v *volume) error {
	if _, err := p.dir.root.Lstat(v.dir()); err == nil {
		if err := p.dir.move(v.dir(), p.aside(v)); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return p.dir.remove(p.aside(v))
}

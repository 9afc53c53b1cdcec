package pool

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// directory is the storage directory as its operations: each either happens durably or leaves what was there. Names are
// relative to it and cannot leave it.
type directory struct {
	path string
	root *os.Root
	step func(op, name string) error // set by tests: called before every change; its error stands for the change's failure
}

func openDirectory(name string) (*directory, error) {
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, fmt.Errorf("storage directory: %w", err)
	}
	return &directory{path: name, root: root}, nil
}

func (d *directory) Close() error { return d.root.Close() }

// lock takes the lock file for this process. It is released by closing the file.
func (d *directory) lock() (*os.File, error) {
	if err := d.before("lock", lockFile); err != nil {
		return nil, err
	}
	f, err := d.root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, classify(err)
	}
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			err = fmt.Errorf("%w: another process serves the storage directory %s", ErrBusy, d.path)
		} else {
			err = fmt.Errorf("lock %s: %w", filepath.Join(d.path, lockFile), err)
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// mkdir makes a directory; one that exists is fine.
func (d *directory) mkdir(name string) error {
	if err := d.before("mkdir", name); err != nil {
		return err
	}
	if err := d.root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return classify(err)
	}
	return nil
}

// read returns the content of a small file.
func (d *directory) read(name string) ([]byte, error) { return d.root.ReadFile(name) }

// list returns the names in a directory, sorted.
func (d *directory) list(name string) ([]fs.DirEntry, error) { return fs.ReadDir(d.root.FS(), name) }

// replace makes b the content of the file name, at once.
func (d *directory) replace(name string, b []byte) error {
	aside := name + asideSuffix
	err := d.write(aside, b)
	if err == nil {
		if err = d.before("rename", name); err == nil {
			err = d.root.Rename(aside, name)
		}
	}
	if err != nil {
		if rmErr := d.root.Remove(aside); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, rmErr)
		}
		return classify(err)
	}
	return d.sync(path.Dir(name))
}

// write makes a file with content b, durable as far as the file itself goes.
func (d *directory) write(name string, b []byte) (err error) {
	if err := d.before("write", name); err != nil {
		return err
	}
	f, err := d.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}

// inPlace returns nil when the directory's path still leads to it, and not to what was mounted over it, say.
func (d *directory) inPlace() error {
	there, err := os.Stat(d.path)
	if err != nil {
		return fmt.Errorf("storage directory: %w", err)
	}
	here, err := d.root.Stat(".")
	if err != nil {
		return fmt.Errorf("storage directory: %w", err)
	}
	if !os.SameFile(there, here) {
		return fmt.Errorf("%w: %s is another directory than when this process started", ErrInvalid, d.path)
	}
	return nil
}

// create makes the file of an image.
func (d *directory) create(name string) (*storage.OSFile, error) {
	if err := d.before("create", name); err != nil {
		return nil, err
	}
	return storage.Create(filepath.Join(d.path, name))
}

// open opens the file of an image, which must lie in the directory itself and not behind a symbolic link.
func (d *directory) open(name string, mode storage.Mode) (*storage.OSFile, error) {
	if _, err := d.root.Lstat(name); err != nil {
		return nil, err
	}
	return storage.Open(filepath.Join(d.path, name), mode)
}

// move renames an entry, from one directory to another. Moving again is fine: it makes durable what a failed sync may
// have not.
func (d *directory) move(from, to string) error {
	if err := d.before("move", to); err != nil {
		return err
	}
	if err := d.root.Rename(from, to); err != nil {
		if _, there := d.root.Lstat(to); there != nil || !errors.Is(err, fs.ErrNotExist) {
			return classify(err)
		}
	}
	return errors.Join(d.sync(path.Dir(to)), d.sync(path.Dir(from)))
}

// remove removes an entry with everything in it; one that is absent is fine.
func (d *directory) remove(name string) error {
	if err := d.before("remove", name); err != nil {
		return err
	}
	return d.root.RemoveAll(name)
}

// sync makes the entries of a directory durable.
func (d *directory) sync(name string) error {
	if err := d.before("sync", name); err != nil {
		return err
	}
	f, err := d.root.Open(name)
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return errors.Join(classify(fmt.Errorf("sync directory %s: %w", name, err)), f.Close())
	}
	return f.Close()
}

// allocated returns the space that a file takes; 0 when there is none, or none that can be looked at.
func (d *directory) allocated(name string) int64 {
	info, err := d.root.Lstat(name)
	if err != nil {
		return 0
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512 // st_blocks counts 512-byte units, whatever the block size
}

// space returns the size of the filesystem and what is free for users of it, in bytes.
func (d *directory) space() (total, free int64, err error) {
	f, err := d.root.Open(".")
	if err != nil {
		return 0, 0, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, 0, errors.Join(fmt.Errorf("statfs %s: %w", d.path, err), f.Close())
	}
	return int64(st.Blocks) * st.Frsize, int64(st.Bavail) * st.Frsize, f.Close()
}

// before gives tests the chance to fail, or to crash, what comes next.
func (d *directory) before(op, name string) error {
	if d.step == nil {
		return nil
	}
	return classify(d.step(op, name))
}

package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// target says where a command makes a file.
type target struct{ force bool }

func addTargetFlags(cmd *cobra.Command) *target {
	var t target
	cmd.Flags().BoolVar(&t.force, "force", false, "replace a file that exists already, unless it is in use")
	return &t
}

// create makes the file at path, which fill writes and makes durable, and may close. It is there whole and durable, or it is not there:
// until it is whole it has another name, in the same folder, and where that fails it is removed.
func (t target) create(path string, fill func(f *storage.OSFile) error) (err error) {
	path, old, err := t.claim(path)
	if err != nil {
		return err
	}
	if old != nil {
		defer func() { err = errors.Join(err, old.Close()) }()
	}
	temporary := filepath.Join(filepath.Dir(path), ".qcow-csi-"+rand.Text()+".tmp")
	f, err := storage.Create(temporary)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	err = fill(f)
	if closeErr := f.Close(); !errors.Is(closeErr, os.ErrClosed) {
		err = errors.Join(err, closeErr)
	}
	if err == nil {
		err = rename(temporary, path, old != nil)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, errors.Join(err, os.Remove(temporary)))
	}
	if err := syncDirectory(filepath.Dir(path)); err != nil {
		return fmt.Errorf("%s is there, but a power cut may take it away: %w", path, err)
	}
	return nil
}

// claim returns the path that the file is going to have, and the file that it replaces, locked against all other users; nil where
// there is none.
func (t target) claim(path string) (string, *storage.OSFile, error) {
	_, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return path, nil, nil
	case err != nil:
		return "", nil, err
	case !t.force:
		return "", nil, fmt.Errorf("%s: %w; --force replaces it", path, os.ErrExist)
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", nil, err
	}
	old, err := storage.Open(resolved, storage.ReadWrite)
	if err != nil {
		return "", nil, fmt.Errorf("%s can't be replaced: %w", path, err)
	}
	return resolved, old, nil
}

// rename gives the file at from the name to. Unless replace says so, none may have that.
func rename(from, to string, replace bool) error {
	if replace {
		return os.Rename(from, to)
	}
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if err == nil || !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	// The file system can't do that; a link is refused just so where the name is taken.
	if err := os.Link(from, to); err != nil {
		return err
	}
	return os.Remove(from)
}

// syncDirectory makes durable which names are in a folder.
func syncDirectory(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

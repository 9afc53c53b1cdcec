package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Journals is a directory of journals: one for each image file that is open for writing, called after the file's number, so that the next who
// opens the image finds it.
type Journals struct{ dir string }

// OpenJournals returns the journals in dir, which should be in memory (tmpfs), and has to be kept for as long as the machine runs. It makes the
// directory if there is none.
func OpenJournals(dir string) (*Journals, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory for journals: %w", classify(err))
	}
	return &Journals{dir}, nil
}

// Open opens the journal of an image, as [OpenJournal] does.
func (d *Journals) Open(image *OSFile) (*Journal, error) {
	return OpenJournal(d.path(image), image)
}

func (d *Journals) path(image *OSFile) string {
	return filepath.Join(d.dir, fmt.Sprintf("%x-%x.journal", image.id.dev, image.id.ino))
}

// Remove removes the journal of an image that was closed clean, or deleted, if there is one. One that somebody has open stays.
func (d *Journals) Remove(image *OSFile) error {
	path := d.path(image)
	f, _, err := openRegular(path, os.O_RDWR, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	err = lockJournal(f, path)
	if err == nil {
		err = os.Remove(path)
	}
	if errors.Is(err, ErrBusy) || errors.Is(err, errReplaced) {
		err = nil
	}
	return errors.Join(err, f.Close())
}

// errReplaced: the file was removed, or another one has its name, before it was locked.
var errReplaced = errors.New("journal was replaced")

// lockJournal locks the journal f, which was opened by this path. It fails with ErrBusy where another process has it.
func lockJournal(f *os.File, path string) error {
	err := control(f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	if err != nil {
		return err
	}
	named, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return errReplaced
	}
	if err != nil {
		return err
	}
	locked, err := f.Stat()
	if err == nil && !os.SameFile(named, locked) {
		err = errReplaced
	}
	return err
}

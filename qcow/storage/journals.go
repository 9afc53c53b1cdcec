package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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

// Remove removes the journal of an image that is being deleted, if there is one. The caller has the image locked.
func (d *Journals) Remove(image *OSFile) error {
	if err := os.Remove(d.path(image)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

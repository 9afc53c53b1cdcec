package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// file is a file with random content.
type file struct {
	path string
	sum  [sha256.Size]byte
}

type files []file

// writeFiles makes n files of size random bytes in a new directory, durably.
func writeFiles(ctx context.Context, dir string, n int, size int64) (files, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	var made files
	content := make([]byte, size)
	for i := range n {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if _, err := rand.Read(content); err != nil {
			return nil, err
		}
		f := file{path: filepath.Join(dir, fmt.Sprintf("%04d", i)), sum: sha256.Sum256(content)}
		if err := writeAndSync(f.path, content); err != nil {
			return nil, err
		}
		made = append(made, f)
	}
	return made, nil
}

func writeAndSync(path string, content []byte) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.Sync()
}

// verify reads the files and compares them with what was written.
func (fs files) verify() error {
	if len(fs) == 0 {
		return errors.New("no files were written")
	}
	for _, f := range fs {
		content, err := os.ReadFile(f.path)
		if err != nil {
			return err
		}
		if sha256.Sum256(content) != f.sum {
			return fmt.Errorf("%s does not hold what was written to it", f.path)
		}
	}
	return nil
}

// sum is a short checksum over all files.
func (fs files) sum() string {
	h := sha256.New()
	for _, f := range fs {
		h.Write(f.sum[:])
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// writeDevice writes to an open device node, durably.
func writeDevice(path string, content []byte, off int64) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.WriteAt(content, off); err != nil {
		return err
	}
	return f.Sync()
}

// verifyDevice reads a device and compares it with what was written.
func verifyDevice(path string, content []byte, off int64) error {
	got, err := readDevice(path, off, int64(len(content)))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, content) {
		return fmt.Errorf("%s does not hold at %d what was written there", path, off)
	}
	return nil
}

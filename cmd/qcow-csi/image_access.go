package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// access is how a command opens the images that it is given.
type access struct {
	shared     bool
	passphrase passphraseFile
}

// addAccessFlags adds the flags of a command that opens images. One that only reads can do so while others write.
func addAccessFlags(cmd *cobra.Command, readOnly bool) *access {
	var a access
	if readOnly {
		addShareFlag(cmd, &a)
	}
	cmd.Flags().VarP(&a.passphrase, "passphrase-file", "", "file with the passphrase of encrypted images; one newline at its end is dropped")
	return &a
}

func addShareFlag(cmd *cobra.Command, a *access) {
	cmd.Flags().BoolVarP(&a.shared, "force-share", "U", false,
		"open the image even while somebody writes to it; what is read then may contradict itself")
}

// mode returns how the file is locked.
func (a *access) mode(readOnly bool) storage.Mode {
	switch {
	case a.shared:
		return storage.Shared
	case readOnly:
		return storage.ReadOnly
	}
	return storage.ReadWrite
}

// gate opens what the image at path names.
func (a *access) gate(path string) qcow.Gate {
	if a.shared {
		return qcow.BesideShared(path)
	}
	return qcow.Beside(path)
}

// openImage opens the image at path, and the files that it names. Closing the image closes them all.
func (a *access) openImage(ctx context.Context, path string, o qcow.Options) (_ *storage.OSFile, _ *qcow.Image, err error) {
	if o.Passphrase, err = a.passphrase.read(); err != nil {
		return nil, nil, err
	}
	f, err := openFile(path, a.mode(o.ReadOnly))
	if err != nil {
		return nil, nil, err
	}
	o.Gate = a.gate(path)
	img, err := qcow.OpenContext(ctx, f, o)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, errors.Join(err, f.Close()))
	}
	return f, img, nil
}

// withImage runs do on the image at path, and closes it.
func (a *access) withImage(ctx context.Context, path string, o qcow.Options, do func(f *storage.OSFile, img *qcow.Image) error) error {
	f, img, err := a.openImage(ctx, path, o)
	if err != nil {
		return err
	}
	if err := errors.Join(do(f, img), img.Close()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// withFile runs do on the file at path, and closes it.
func (a *access) withFile(path string, readOnly bool, do func(f *storage.OSFile) error) error {
	f, err := openFile(path, a.mode(readOnly))
	if err != nil {
		return err
	}
	if err := errors.Join(do(f), f.Close()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// openFile opens and locks the file at path. Unlike the driver, which opens only files that it has made, it follows
// symbolic links: the operator named it.
func openFile(path string, mode storage.Mode) (*storage.OSFile, error) {
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	return storage.Open(resolved, mode)
}

// passphraseFile is a flag that names a file with a passphrase: on a command line everybody could read it.
type passphraseFile string

// maxPassphrase bounds the length of a passphrase in bytes; it is a guard against the wrong file.
const maxPassphrase = 64 << 10

func (p *passphraseFile) String() string { return string(*p) }
func (p *passphraseFile) Type() string   { return "file" }

// Set implements pflag.Value.
func (p *passphraseFile) Set(s string) error {
	*p = passphraseFile(s)
	return nil
}

// read returns the passphrase; nothing where no file is named.
func (p *passphraseFile) read() ([]byte, error) {
	if *p == "" {
		return nil, nil
	}
	f, err := os.Open(string(*p))
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPassphrase+1))
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	if n := len(b); n > 0 && b[n-1] == '\n' {
		b = b[:n-1]
	}
	switch {
	case len(b) == 0:
		return nil, fmt.Errorf("passphrase: %s is empty", *p)
	case len(b) > maxPassphrase:
		return nil, fmt.Errorf("passphrase: %s has more than %d bytes", *p, maxPassphrase)
	}
	return b, nil
}

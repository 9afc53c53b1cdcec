package qcow

import (
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

// Encryption methods (specification, header, bytes 32-35).
const (
	cryptNone = 0
	cryptAES  = 1 // legacy: AES-CBC by guest sector
	cryptLUKS = 2
)

// ErrPassphrase says that an encrypted image can't be opened with the passphrase given, or without any.
var ErrPassphrase = luks.ErrPassphrase

// openCipher finds the key of an encrypted image.
func (img *Image) openCipher(ctx context.Context, passphrase []byte) error {
	switch {
	case img.cryptMethod == cryptNone:
		return nil
	case len(passphrase) == 0:
		return fmt.Errorf("no passphrase for an encrypted image: %w", ErrPassphrase)
	case img.cryptMethod == cryptAES:
		c, err := luks.LegacyAES(passphrase)
		if err != nil {
			return err
		}
		img.cipher = c
		return nil
	}
	b, err := img.readEncryptionHeader()
	if err != nil {
		return err
	}
	c, _, err := luks.Open(ctx, b, passphrase)
	if err != nil {
		return fmt.Errorf("encryption header: %w", err)
	}
	img.cipher = c
	return nil
}

// readEncryptionHeader reads the LUKS header and the key material behind it.
func (img *Image) readEncryptionHeader() ([]byte, error) {
	off, n, err := img.header.Encryption()
	if err != nil {
		return nil, err
	}
	if n == 0 || n > luks.MaxHeaderBytes {
		return nil, format.Corruptf("header", 32, "an encryption header of %d bytes", n)
	}
	b := make([]byte, n)
	if err := readFull(img.file, b, off); err != nil {
		return nil, fmt.Errorf("read encryption header: %w", err)
	}
	return b, nil
}

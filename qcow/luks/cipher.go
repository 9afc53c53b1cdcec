package luks

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"

	"golang.org/x/crypto/xts"
)

// SectorSize is the number of bytes that are encrypted as a unit.
const SectorSize = 512

const blockSize = 16 // of every cipher here

// Cipher encrypts and decrypts sectors. It is safe for concurrent use.
type Cipher struct {
	xts     *xts.Cipher  // nil: the mode is CBC
	block   cipher.Block // of CBC
	essiv   cipher.Block // of the IV generator essiv, otherwise nil
	shortIV bool         // the IV generator plain, which has only 32 bits of the sector number
}

// LegacyAES returns the cipher of a qcow2 image with encryption method 1: AES-128 in mode CBC. The key is the
// password itself, cut off after 16 bytes or filled up with zeroes; nothing in the image tells whether it is right,
// and the zeroes of a hole are not encrypted. The method protects nothing against who can change the image or sees it
// twice; it is there for the sake of old images.
func LegacyAES(password []byte) (*Cipher, error) {
	var key [16]byte
	defer clear(key[:])
	copy(key[:], password)
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, fmt.Errorf("legacy AES: %w", err)
	}
	return &Cipher{block: block}, nil
}

// Encrypt encrypts p in place. Its first 512 bytes are sector number sector, the next ones follow it; package
// documentation, "Sector numbers", says what is counted. Encrypt panics unless len(p) is a multiple of SectorSize.
func (c *Cipher) Encrypt(p []byte, sector uint64) {
	checkLength(p)
	for ; len(p) > 0; p, sector = p[SectorSize:], sector+1 {
		if b := p[:SectorSize]; c.xts != nil {
			c.xts.Encrypt(b, b, c.number(sector))
		} else {
			cipher.NewCBCEncrypter(c.block, c.iv(sector)).CryptBlocks(b, b)
		}
	}
}

// Decrypt decrypts p in place; it is the opposite of Encrypt in every respect.
func (c *Cipher) Decrypt(p []byte, sector uint64) {
	checkLength(p)
	for ; len(p) > 0; p, sector = p[SectorSize:], sector+1 {
		if b := p[:SectorSize]; c.xts != nil {
			c.xts.Decrypt(b, b, c.number(sector))
		} else {
			cipher.NewCBCDecrypter(c.block, c.iv(sector)).CryptBlocks(b, b)
		}
	}
}

func checkLength(p []byte) {
	if len(p)%SectorSize != 0 {
		panic(fmt.Sprintf("luks: %d bytes are not a whole number of sectors", len(p)))
	}
}

// number returns what the IV generator makes of a sector number.
func (c *Cipher) number(sector uint64) uint64 {
	if c.shortIV {
		sector &= 1<<32 - 1
	}
	return sector
}

// iv returns the initialization vector of a sector.
func (c *Cipher) iv(sector uint64) []byte {
	iv := make([]byte, blockSize)
	binary.LittleEndian.PutUint64(iv, c.number(sector))
	if c.essiv != nil {
		c.essiv.Encrypt(iv, iv)
	}
	return iv
}

package luks_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

// knownKey returns a cipher of Create and its master key, which is the first thing that is read from the random source.
func knownKey(t testing.TB, o luks.CreateOptions, keyBytes int, seed byte) (*luks.Cipher, []byte) {
	t.Helper()
	key := make([]byte, keyBytes)
	if _, err := rand.NewChaCha8([32]byte{seed}).Read(key); err != nil {
		t.Fatal(err)
	}
	o.Random = rand.NewChaCha8([32]byte{seed})
	_, c := create(t, o, "pw")
	return c, key
}

func TestXTSIsTheStandards(t *testing.T) {
	for _, keyBytes := range []int{32, 48, 64} {
		c, key := knownKey(t, luks.CreateOptions{Cipher: fmt.Sprint("aes-", keyBytes*4)}, keyBytes, 1)
		agrees(t, c, func(p []byte, sector uint64) { plainXTS(t, key, p, sector) })
	}
}

// plainXTS encrypts a sector as IEEE Std 1619 words it: block j is encrypted with the tweak that is the encrypted
// sector number times x to the j.
func plainXTS(t *testing.T, key, p []byte, sector uint64) {
	t.Helper()
	data, err := aes.NewCipher(key[:len(key)/2])
	if err != nil {
		t.Fatal(err)
	}
	tweak, err := aes.NewCipher(key[len(key)/2:])
	if err != nil {
		t.Fatal(err)
	}
	first := binary.LittleEndian.AppendUint64(nil, sector)
	first = append(first, make([]byte, 8)...)
	tweak.Encrypt(first, first)
	slices.Reverse(first) // the standard's polynomial is little endian
	product := new(big.Int).SetBytes(first)
	polynomial := new(big.Int).SetBit(big.NewInt(0x87), 128, 1)
	for ; len(p) > 0; p = p[16:] {
		mask := product.FillBytes(make([]byte, 16))
		slices.Reverse(mask)
		subtle.XORBytes(p, p[:16], mask)
		data.Encrypt(p, p)
		subtle.XORBytes(p, p[:16], mask)
		if product.Lsh(product, 1); product.Bit(128) == 1 {
			product.Xor(product, polynomial)
		}
	}
}

// TestXTSVector encrypts vector 4 of IEEE Std 1619: bytes counting up, sector 0.
func TestXTSVector(t *testing.T) {
	key, err := hex.DecodeString("2718281828459045235360287471352631415926535897932384626433832795")
	if err != nil {
		t.Fatal(err)
	}
	o := luks.CreateOptions{Cipher: "aes-128"}
	o.Random = io.MultiReader(bytes.NewReader(key), rand.NewChaCha8([32]byte{}))
	_, c := create(t, o, "pw")
	p := make([]byte, luks.SectorSize)
	for i := range p {
		p[i] = byte(i)
	}
	c.Encrypt(p, 0)
	if got, want := hex.EncodeToString(p[:16]), "27a7479befa1d476489f308cd4cfa6e2"; got != want {
		t.Errorf("begins with %s, want %s", got, want)
	}
}

func TestCBCIsTheStandardLibrarys(t *testing.T) {
	plain64 := func(block cipher.Block) func([]byte, uint64) {
		return func(p []byte, sector uint64) {
			iv := binary.LittleEndian.AppendUint64(nil, sector)
			cipher.NewCBCEncrypter(block, append(iv, make([]byte, 8)...)).CryptBlocks(p, p)
		}
	}
	for _, keyBytes := range []int{16, 32} {
		c, key := knownKey(t, luks.CreateOptions{Cipher: fmt.Sprint("aes-", keyBytes*8), Mode: "cbc"}, keyBytes, 2)
		block, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		agrees(t, c, plain64(block))
	}
	legacy, err := luks.LegacyAES([]byte("pw"))
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(append([]byte("pw"), make([]byte, 14)...))
	if err != nil {
		t.Fatal(err)
	}
	agrees(t, legacy, plain64(block))
}

// agrees compares c with another way to encrypt a sector.
func agrees(t *testing.T, c *luks.Cipher, encrypt func(p []byte, sector uint64)) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		plain := make([]byte, rng.IntN(9)*luks.SectorSize)
		for i := range plain {
			plain[i] = byte(rng.Uint32())
		}
		sector := rng.Uint64() >> rng.IntN(64)
		want := bytes.Clone(plain)
		for i := 0; i < len(want); i += luks.SectorSize {
			encrypt(want[i:i+luks.SectorSize], sector+uint64(i/luks.SectorSize))
		}
		got := bytes.Clone(plain)
		c.Encrypt(got, sector)
		if !bytes.Equal(got, want) {
			t.Fatalf("%d bytes at sector %d differ", len(plain), sector)
		}
		c.Decrypt(got, sector)
		if !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes at sector %d do not decrypt", len(plain), sector)
		}
	}
}

func TestCipherIsConcurrent(t *testing.T) {
	for _, o := range []luks.CreateOptions{{}, {Mode: "cbc", IVGenerator: "essiv"}} {
		_, c := create(t, o, "pw")
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				p := make([]byte, 8<<10)
				for k := range 50 {
					sector := uint64(i*1000 + k)
					c.Encrypt(p, sector)
					c.Decrypt(p, sector)
				}
				if !bytes.Equal(p, make([]byte, len(p))) {
					t.Error("does not decrypt")
				}
			})
		}
		all.Wait()
	}
}

func TestPartOfASector(t *testing.T) {
	c, err := luks.LegacyAES(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func([]byte, uint64){"Encrypt": c.Encrypt, "Decrypt": c.Decrypt} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s of 513 bytes did not panic", name)
				}
			}()
			f(make([]byte, 513), 0)
		}()
	}
}

func BenchmarkCipher(b *testing.B) {
	for _, o := range []luks.CreateOptions{
		{Cipher: "aes-256", Mode: "xts", IVGenerator: "plain64"},
		{Cipher: "aes-128", Mode: "xts", IVGenerator: "plain64"},
		{Cipher: "aes-256", Mode: "cbc", IVGenerator: "essiv"},
	} {
		_, c := create(b, o, "pw")
		for _, size := range []int{4 << 10, 64 << 10} {
			for name, f := range map[string]func([]byte, uint64){"encrypt": c.Encrypt, "decrypt": c.Decrypt} {
				b.Run(fmt.Sprintf("%s-%s-%s/%dKiB/%s", o.Cipher, o.Mode, o.IVGenerator, size>>10, name), func(b *testing.B) {
					p := make([]byte, size)
					b.SetBytes(int64(size))
					b.ReportAllocs()
					for b.Loop() {
						f(p, 12345)
					}
				})
			}
		}
	}
}

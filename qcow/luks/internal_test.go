package luks

import (
	"bytes"
	"context"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"errors"
	"hash"
	"testing"
)

func TestDeriveIsPBKDF2(t *testing.T) {
	for _, newHash := range []func() hash.Hash{sha1.New, sha256.New} {
		for _, n := range []int{1, 16, 20, 32, 33, 64} {
			for _, iterations := range []uint32{1, 2, 5000} {
				got, err := derive(t.Context(), newHash, []byte("secret"), []byte("salt"), iterations, n)
				if err != nil {
					t.Fatal(err)
				}
				want, err := pbkdf2.Key(newHash, "secret", []byte("salt"), int(iterations), n)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%d iterations, %d bytes: %x, want %x", iterations, n, got, want)
				}
			}
		}
	}
}

func TestDeriveEndsWithItsContext(t *testing.T) {
	reason := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	done := make(chan error)
	go func() {
		_, err := derive(ctx, sha256.New, nil, nil, 1<<32-1, 64)
		done <- err
	}()
	cancel(reason)
	if err := <-done; !errors.Is(err, reason) {
		t.Error(err)
	}
	if _, err := calibrate(ctx, sha256.New, 64, 1e9); !errors.Is(err, reason) {
		t.Error(err)
	}
}

func TestSplitJoins(t *testing.T) {
	for _, keyBytes := range []int{16, 24, 32, 48, 64} { // below, at and above the length of a digest
		for _, n := range []int{1, 2, 4000} {
			key, stripes := make([]byte, keyBytes), make([]byte, keyBytes*n)
			if _, err := rand.Read(key); err != nil {
				t.Fatal(err)
			}
			if err := split(stripes, key, sha256.New(), rand.Reader); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, keyBytes)
			join(got, stripes, sha256.New())
			if !bytes.Equal(got, key) {
				t.Errorf("key of %d bytes in %d stripes does not join", keyBytes, n)
			}
			stripes[len(stripes)/2] ^= 1
			if join(got, stripes, sha256.New()); bytes.Equal(got, key) {
				t.Errorf("key of %d bytes in %d stripes joins although one bit is wrong", keyBytes, n)
			}
		}
	}
}

// TestKeyMaterialThatEndsInASector opens what QEMU can't, and Create refuses therefore: 192 bits in mode CBC.
func TestKeyMaterialThatEndsInASector(t *testing.T) {
	for _, cipher := range []string{"aes", "twofish"} {
		a := algorithm{cipher: cipher, keyBytes: 24, mode: modeCBC, iv: ivPlain64, hash: "sha256"}
		b, c, err := create(t.Context(), a, []byte("pw"), MinIterations, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		again, info, err := Open(t.Context(), b, []byte("pw"))
		if err != nil {
			t.Fatal(err)
		}
		if info.Cipher != cipher+"-192" {
			t.Errorf("%+v", info)
		}
		p := make([]byte, 4096)
		c.Encrypt(p, 7)
		again.Decrypt(p, 7)
		if !bytes.Equal(p, make([]byte, 4096)) {
			t.Error("does not decrypt")
		}
		if _, _, err := Create(t.Context(), []byte("pw"), CreateOptions{Cipher: a.name(), Mode: "cbc"}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("created, error %v", err)
		}
	}
}

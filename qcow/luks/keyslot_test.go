package luks_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

var fast = luks.KeyOptions{Iterations: luks.MinIterations}

// apply makes writes in a copy of a header.
func apply(header []byte, writes ...luks.Write) []byte {
	b := bytes.Clone(header)
	for _, w := range writes {
		copy(b[w.Offset:], w.Data)
	}
	return b
}

// opens checks which slot a passphrase opens; -1 for none.
func opens(t *testing.T, header []byte, passphrase string, want int) {
	t.Helper()
	slot, err := luks.FindKey(t.Context(), header, []byte(passphrase))
	switch {
	case want < 0 && !errors.Is(err, luks.ErrPassphrase):
		t.Errorf("%q opens slot %d, error %v, want none", passphrase, slot, err)
	case want >= 0 && (err != nil || slot != want):
		t.Errorf("%q opens slot %d, error %v, want %d", passphrase, slot, err, want)
	}
}

// TestQEMUAmend opens what qemu-img amend made: keys in chosen slots, and one removed.
func TestQEMUAmend(t *testing.T) {
	header, c := create(t, luks.CreateOptions{}, "first")
	path := device(t, header, 64<<10)
	p := bytes.Repeat([]byte{0x33}, 64<<10)
	c.Encrypt(p, 0)
	writeAt(t, path, int64(len(header)), p)
	amend := func(passphrase string, options ...string) {
		t.Helper()
		args := append([]string{"amend"}, secret("s", passphrase)...)
		args = append(args, secret("new", "second")...)
		qemu(t, "qemu-img", append(args, "--image-opts", "driver=luks,key-secret=s,file.filename="+path, "-o", opts("", options...))...)
	}
	amend("first", "state", "active", "new-secret", "new", "keyslot", "6", "iter-time", "10")
	b := readFile(t, path)
	opens(t, b, "first", 0)
	opens(t, b, "second", 6)
	opens(t, b, "third", -1)

	amend("second", "state", "inactive", "keyslot", "0")
	b = readFile(t, path)
	opens(t, b, "first", -1)
	opens(t, b, "second", 6)
	again, info := open(t, b, "second")
	sameInfo(t, info, infoOf(t, path, "luks"))
	decrypts(t, again, b[len(header):], 0, 0x33)
}

// TestAddAndRemoveKeys fills all slots and empties all but one; QEMU opens with what should open.
func TestAddAndRemoveKeys(t *testing.T) {
	for _, o := range []luks.CreateOptions{{}, {Cipher: "aes-128", Mode: "cbc", IVGenerator: "essiv", Hash: "sha1"}} {
		t.Run(nameOf(o), func(t *testing.T) {
			header, c := create(t, o, "key 0")
			p := bytes.Repeat([]byte{0x33}, 4096)
			c.Encrypt(p, 0)
			b := header
			for i := 1; i < luks.Slots; i++ {
				before := bytes.Clone(b)
				writes, slot, err := luks.AddKey(t.Context(), b, fmt.Appendf(nil, "key %d", i-1), fmt.Appendf(nil, "key %d", i), fast)
				if err != nil || slot != i {
					t.Fatalf("slot %d, error %v, want %d", slot, err, i)
				}
				if !bytes.Equal(b, before) {
					t.Error("the header was changed")
				}
				b = apply(b, writes...)
			}
			if _, _, err := luks.AddKey(t.Context(), b, []byte("key 3"), []byte("key 8"), fast); !errors.Is(err, luks.ErrInvalid) {
				t.Errorf("a ninth key: %v", err)
			}
			path := device(t, b, 4096)
			writeAt(t, path, int64(len(b)), p)
			for i := range luks.Slots {
				opens(t, b, fmt.Sprint("key ", i), i)
				deviceIO(t, path, fmt.Sprint("key ", i), "read -P 0x33 0 4k")
			}
			info, err := luks.Inspect(b)
			if err != nil {
				t.Fatal(err)
			}
			sameInfo(t, info, infoOf(t, path, "luks"))

			for i := range luks.Slots - 1 {
				writes, err := luks.RemoveKey(b, i, nil)
				if err != nil {
					t.Fatal(err)
				}
				old := b[info.KeySlots[i].KeyOffset:][:32000]
				b = apply(b, writes...)
				if bytes.Equal(b[info.KeySlots[i].KeyOffset:][:32000], old) {
					t.Errorf("key material of slot %d is still there", i)
				}
				opens(t, b, fmt.Sprint("key ", i), -1)
			}
			if _, err := luks.RemoveKey(b, luks.Slots-1, nil); !errors.Is(err, luks.ErrInvalid) || !strings.Contains(err.Error(), "only active") {
				t.Errorf("the last key: %v", err)
			}
			for _, slot := range []int{-1, 0, luks.Slots} {
				if _, err := luks.RemoveKey(b, slot, nil); !errors.Is(err, luks.ErrInvalid) {
					t.Errorf("slot %d: %v", slot, err)
				}
			}
			writeAt(t, path, 0, b)
			deviceIO(t, path, "key 7", "read -P 0x33 0 4k")
			refused(t, path, "key 2")
		})
	}
}

// TestKeysSurviveCrashes tears the writes of every slot in sectors: in every state the other key opens, and the changed
// slot opens with its key or is inactive.
func TestKeysSurviveCrashes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	header, _ := create(t, luks.CreateOptions{Cipher: "aes-128", Mode: "cbc"}, "key 0")
	crashes := func(b []byte, writes []luks.Write, check func([]byte)) {
		for i, w := range writes {
			before := apply(b, writes[:i]...)
			check(before)
			after := apply(before, w)
			for range 3 { // some sectors of the write are on disk
				torn := bytes.Clone(before)
				for s := 0; s < len(b); s += luks.SectorSize {
					if rng.IntN(2) == 1 {
						copy(torn[s:s+luks.SectorSize], after[s:])
					}
				}
				check(torn)
			}
		}
		check(apply(b, writes...))
	}
	// state checks that the slot is inactive, or opens with its key and no other.
	state := func(slot int, key string, b []byte) {
		t.Helper()
		opens(t, b, "key 0", 0)
		info, err := luks.Inspect(b)
		if err != nil {
			t.Fatal(err)
		}
		if info.KeySlots[slot].Active {
			opens(t, b, key, slot)
		} else {
			opens(t, b, key, -1)
		}
	}
	b := header
	for slot := 1; slot < luks.Slots; slot++ {
		key := fmt.Sprint("key ", slot)
		writes, _, err := luks.AddKey(t.Context(), b, []byte("key 0"), []byte(key), fast)
		if err != nil {
			t.Fatal(err)
		}
		crashes(b, writes, func(b []byte) { state(slot, key, b) })
		b = apply(b, writes...)
		if writes, err = luks.RemoveKey(b, slot, nil); err != nil {
			t.Fatal(err)
		}
		crashes(b, writes, func(b []byte) { state(slot, key, b) })
	}
}

func TestWrongKeyOptions(t *testing.T) {
	header, _ := create(t, luks.CreateOptions{}, "pw")
	for name, o := range map[string]luks.KeyOptions{
		"few iterations":  {Iterations: luks.MinIterations - 1},
		"many iterations": {Iterations: luks.MaxIterations + 1},
		"negative time":   {IterTime: -1},
	} {
		if _, _, err := luks.AddKey(t.Context(), header, []byte("pw"), []byte("new"), o); !errors.Is(err, luks.ErrInvalid) {
			t.Errorf("%s: added, error %v", name, err)
		}
		if _, _, err := luks.Create(t.Context(), []byte("pw"), luks.CreateOptions{KeyOptions: o}); !errors.Is(err, luks.ErrInvalid) {
			t.Errorf("%s: created, error %v", name, err)
		}
	}
	if _, _, err := luks.AddKey(t.Context(), header, []byte("pw"), nil, fast); !errors.Is(err, luks.ErrInvalid) {
		t.Errorf("empty passphrase added: %v", err)
	}
	if _, _, err := luks.Create(t.Context(), nil, luks.CreateOptions{KeyOptions: fast}); !errors.Is(err, luks.ErrInvalid) {
		t.Errorf("empty passphrase: %v", err)
	}
	if _, _, err := luks.AddKey(t.Context(), header, []byte("wrong"), []byte("new"), fast); !errors.Is(err, luks.ErrPassphrase) {
		t.Errorf("wrong passphrase: %v", err)
	}
}

func TestUnknownAlgorithms(t *testing.T) {
	for _, o := range []luks.CreateOptions{
		{Cipher: "aes"},
		{Cipher: "aes-"},
		{Cipher: "aes-257"},
		{Cipher: "aes-512"},
		{Cipher: "aes--128"},
		{Cipher: "serpent-256"},
		{Mode: "ecb"},
		{Mode: "xts-plain64"},
		{IVGenerator: "lmk"},
		{IVGenerator: "essiv", IVHash: "sha256"},
		{Mode: "cbc", IVGenerator: "essiv", IVHash: "sha512"},
		{Mode: "cbc", IVGenerator: "essiv", IVHash: "sha3"},
		{Hash: "md5"},
	} {
		if _, err := luks.HeaderSize(o); !errors.Is(err, luks.ErrUnsupported) {
			t.Errorf("%+v: header size, error %v", o, err)
		}
		if _, _, err := luks.Create(t.Context(), []byte("pw"), o); !errors.Is(err, luks.ErrUnsupported) {
			t.Errorf("%+v: created, error %v", o, err)
		}
	}
}

// TestBrokenRandom runs out of random bytes at every place.
func TestBrokenRandom(t *testing.T) {
	broken := errors.New("no more")
	for n := 0; ; n += 16 {
		o := luks.CreateOptions{Cipher: "aes-128", Mode: "cbc", KeyOptions: luks.KeyOptions{Iterations: 1000, Random: &limited{n: n, err: broken}}}
		header, c, err := luks.Create(t.Context(), []byte("pw"), o)
		if err == nil {
			if n < 64000 {
				t.Errorf("%d random bytes were enough", n)
			}
			break
		}
		if !errors.Is(err, broken) || header != nil || c != nil {
			t.Fatalf("after %d bytes: error %v", n, err)
		}
		if n > 256 {
			n += 8000
		}
	}
	header, _ := create(t, luks.CreateOptions{Cipher: "aes-128", Mode: "cbc"}, "pw")
	for _, n := range []int{0, 31, 32, 60000} {
		o := luks.KeyOptions{Iterations: 1000, Random: &limited{n: n, err: broken}}
		if _, _, err := luks.AddKey(t.Context(), header, []byte("pw"), []byte("new"), o); !errors.Is(err, broken) {
			t.Errorf("key added with %d random bytes: %v", n, err)
		}
	}
	writes, _, err := luks.AddKey(t.Context(), header, []byte("pw"), []byte("new"), fast)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := luks.RemoveKey(apply(header, writes...), 1, &limited{n: 100, err: broken}); !errors.Is(err, broken) {
		t.Errorf("key removed: %v", err)
	}
}

// limited is a reader of n bytes, the same for each instance.
type limited struct {
	n   int
	err error
	rng *rand.ChaCha8
}

func (l *limited) Read(p []byte) (int, error) {
	if l.n == 0 {
		return 0, l.err
	}
	if l.rng == nil {
		l.rng = rand.NewChaCha8([32]byte{1})
	}
	p = p[:min(len(p), l.n)]
	l.n -= len(p)
	return l.rng.Read(p)
}

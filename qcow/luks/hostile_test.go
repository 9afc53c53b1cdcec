package luks_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

func set32(at int, v uint32) func([]byte) []byte {
	return func(b []byte) []byte { binary.BigEndian.PutUint32(b[at:], v); return b }
}

func set(at int, s string) func([]byte) []byte {
	return func(b []byte) []byte { copy(b[at:], s); return b }
}

const slot0, slot1 = 208, 208 + 48

// TestHostileHeaders damages a header in one place. What is wrong with the prefix fails Inspect too.
func TestHostileHeaders(t *testing.T) {
	header, _ := create(t, luks.CreateOptions{}, "pw")
	for name, c := range map[string]struct {
		damage  func([]byte) []byte
		class   error
		inspect bool // sees it too
	}{
		"empty":                        {func([]byte) []byte { return nil }, luks.ErrCorrupt, true},
		"half the magic":               {func(b []byte) []byte { return b[:3] }, luks.ErrCorrupt, true},
		"magic":                        {set(0, "LUKZ"), luks.ErrCorrupt, true},
		"half the prefix":              {func(b []byte) []byte { return b[:luks.PrefixBytes-1] }, luks.ErrCorrupt, true},
		"LUKS2":                        {set(6, "\x00\x02"), luks.ErrUnsupported, true},
		"cipher name without end":      {set(8, "aes-aes-aes-aes-aes-aes-aes-aes-"), luks.ErrCorrupt, true},
		"mode without end":             {set(40, "xts-plain64xts-plain64xts-plain64"), luks.ErrCorrupt, true},
		"hash without end":             {set(72, "sha256sha256sha256sha256sha256sh"), luks.ErrCorrupt, true},
		"unknown cipher":               {set(8, "aez"), luks.ErrUnsupported, true},
		"no cipher":                    {set(8, "\x00"), luks.ErrUnsupported, true},
		"mode without IV generator":    {set(40, "xts\x00"), luks.ErrUnsupported, true},
		"unknown IV generator":         {set(40, "xts-lmk\x00"), luks.ErrUnsupported, true},
		"essiv without hash":           {set(40, "cbc-essiv\x00"), luks.ErrUnsupported, true},
		"essiv with a long hash":       {set(40, "cbc-essiv:sha512\x00"), luks.ErrUnsupported, true},
		"unknown hash":                 {set(72, "sha3"), luks.ErrUnsupported, true},
		"no key":                       {set32(108, 0), luks.ErrCorrupt, true},
		"key of 4 GiB":                 {set32(108, 1<<32-1), luks.ErrCorrupt, true},
		"odd key":                      {set32(108, 63), luks.ErrUnsupported, true},
		"key of no cipher":             {set32(108, 40), luks.ErrUnsupported, true},
		"short key":                    {set32(108, 2), luks.ErrUnsupported, true},
		"no payload":                   {set32(104, 0), luks.ErrCorrupt, true},
		"payload in the key material":  {set32(104, 4000), luks.ErrCorrupt, true},
		"no digest iterations":         {set32(164, 0), luks.ErrCorrupt, true},
		"endless digest iterations":    {set32(164, 1<<32-1), luks.ErrUnsupported, false},
		"slot state":                   {set32(slot0, 1), luks.ErrCorrupt, true},
		"state of an inactive slot":    {set32(slot1, 0), luks.ErrCorrupt, true},
		"no iterations":                {set32(slot0+4, 0), luks.ErrCorrupt, true},
		"endless iterations":           {set32(slot0+4, 1<<32-1), luks.ErrUnsupported, false},
		"key material in the header":   {set32(slot0+40, 1), luks.ErrCorrupt, true},
		"key material at the start":    {set32(slot0+40, 0), luks.ErrCorrupt, true},
		"key material far away":        {set32(slot0+40, 1<<32-1), luks.ErrCorrupt, true},
		"key material of another slot": {set32(slot1+40, 8+499), luks.ErrCorrupt, true},
		"no stripes":                   {set32(slot0+44, 0), luks.ErrCorrupt, true},
		"no stripes while inactive":    {set32(slot1+44, 0), luks.ErrCorrupt, true},
		"2^32 stripes":                 {set32(slot0+44, 1<<32-1), luks.ErrCorrupt, true},
		"short file":                   {func(b []byte) []byte { return b[:4096+255999] }, luks.ErrCorrupt, false},
		"only the prefix":              {func(b []byte) []byte { return b[:luks.PrefixBytes] }, luks.ErrCorrupt, false},
		"far payload": {func(b []byte) []byte {
			binary.BigEndian.PutUint32(b[104:], 1<<32-1)
			binary.BigEndian.PutUint32(b[slot0+40:], 1<<31)
			return b
		}, luks.ErrCorrupt, false},
		"digest":         {set(112, "x"), luks.ErrPassphrase, false},
		"digest salt":    {set(132, "x"), luks.ErrPassphrase, false},
		"slot salt":      {set(slot0+8, "x"), luks.ErrPassphrase, false},
		"material":       {set(4096+100000, "xyz"), luks.ErrPassphrase, false},
		"no active slot": {set32(slot0, 0xdead), luks.ErrPassphrase, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := c.damage(bytes.Clone(header))
			before := bytes.Clone(b)
			cipher, info, err := luks.Open(t.Context(), b, []byte("pw"))
			if !errors.Is(err, c.class) || cipher != nil || info != nil {
				t.Errorf("opened: error %v, want %v", err, c.class)
			}
			_, err = luks.Inspect(b)
			if c.inspect && !errors.Is(err, c.class) || !c.inspect && err != nil {
				t.Errorf("inspected: error %v", err)
			}
			var e *format.Error
			if c.inspect && (!errors.As(err, &e) || e.Table == "" || e.Reason == "") {
				t.Errorf("error does not say where: %v", err)
			}
			if _, _, err := luks.AddKey(t.Context(), b, []byte("pw"), []byte("new"), fast); !errors.Is(err, c.class) {
				t.Errorf("key added: error %v, want %v", err, c.class)
			}
			if !bytes.Equal(b, before) {
				t.Error("the header was changed")
			}
		})
	}
}

// TestInactiveSlotOutsideTheFile opens, but neither writes outside what it was given.
func TestInactiveSlotOutsideTheFile(t *testing.T) {
	header, _ := create(t, luks.CreateOptions{}, "pw")
	b := header[:4096+256000]
	opens(t, b, "pw", 0)
	if _, _, err := luks.AddKey(t.Context(), b, []byte("pw"), []byte("new"), fast); !errors.Is(err, luks.ErrCorrupt) {
		t.Errorf("key added: %v", err)
	}
	writes, _, err := luks.AddKey(t.Context(), header, []byte("pw"), []byte("new"), fast)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := luks.RemoveKey(apply(header, writes...)[:len(b)], 1, nil); !errors.Is(err, luks.ErrCorrupt) {
		t.Errorf("key removed: %v", err)
	}
}

// TestOpenEndsWithItsContext opens a header that asks for as many iterations as a header may.
func TestOpenEndsWithItsContext(t *testing.T) {
	header, _ := create(t, luks.CreateOptions{}, "pw")
	reason := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	for _, at := range []int{slot0 + 4, 164} {
		b := set32(at, luks.MaxIterations)(bytes.Clone(header))
		done := make(chan error)
		go func() {
			_, _, err := luks.Open(ctx, b, []byte("pw"))
			done <- err
		}()
		cancel(reason)
		if err := <-done; !errors.Is(err, reason) {
			t.Errorf("opened: %v", err)
		}
		if _, _, err := luks.AddKey(ctx, b, []byte("pw"), []byte("new"), fast); !errors.Is(err, reason) {
			t.Errorf("key added: %v", err)
		}
	}
	if _, _, err := luks.Create(ctx, []byte("pw"), luks.CreateOptions{}); !errors.Is(err, reason) {
		t.Errorf("created: %v", err)
	}
}

// FuzzOpen opens damaged headers and changes the keys of those that open. Whatever they hold, nothing panics, every
// error has a class, no write is outside the header, and what was made opens.
//
// The fuzzer chooses the prefix; the key material behind it is that of a sound header, cut off somewhere. Iterations
// are kept low, or it would fuzz PBKDF2.
func FuzzOpen(f *testing.F) {
	header, _ := create(f, luks.CreateOptions{Cipher: "aes-128", Mode: "cbc"}, "pw")
	prefix := header[:luks.PrefixBytes]
	f.Add(bytes.Clone(prefix), uint32(len(header)))
	f.Add(set32(164, 1<<32-1)(bytes.Clone(prefix)), uint32(len(header)))
	f.Add(set32(slot1, 0x00ac71f3)(bytes.Clone(prefix)), uint32(len(header)))
	f.Add(patched(prefix, "twofish", "cbc-essiv:sha256", "sha1", 32), uint32(len(header)))
	f.Add(bytes.Clone(prefix), uint32(70000))
	f.Fuzz(func(t *testing.T, prefix []byte, size uint32) {
		b := bytes.Clone(header[:min(int(size), len(header))])
		copy(b, prefix[:min(len(prefix), luks.PrefixBytes)])
		if len(b) >= luks.PrefixBytes {
			for _, at := range []int{164, slot0 + 4, slot1 + 4, slot1 + 52, slot1 + 100, slot1 + 148, slot1 + 196, slot1 + 244, slot1 + 292} {
				if n := binary.BigEndian.Uint32(b[at:]); n <= luks.MaxIterations {
					set32(at, n%1024)(b)
				}
			}
		}
		if info, err := luks.Inspect(b); err == nil {
			for i, s := range info.KeySlots {
				if s.KeyOffset < luks.PrefixBytes || s.KeyOffset+uint64(info.KeyBytes)*uint64(s.Stripes) > info.PayloadOffset {
					t.Errorf("slot %d is outside the header: %+v", i, info)
				}
			}
		}
		c, _, err := luks.Open(t.Context(), b, []byte("pw"))
		if err != nil {
			if !errors.Is(err, luks.ErrCorrupt) && !errors.Is(err, luks.ErrUnsupported) && !errors.Is(err, luks.ErrPassphrase) {
				t.Errorf("error without a class: %v", err)
			}
			return
		}
		p := make([]byte, luks.SectorSize)
		c.Encrypt(p, 1)
		c.Decrypt(p, 1)
		if !bytes.Equal(p, make([]byte, luks.SectorSize)) {
			t.Error("does not decrypt")
		}
		writes, slot, err := luks.AddKey(t.Context(), b, []byte("pw"), []byte("new"), fast)
		if err != nil {
			return
		}
		for _, w := range writes {
			if w.Offset+uint64(len(w.Data)) > uint64(len(b)) {
				t.Fatalf("write of %d bytes at %d, the header ends at %d", len(w.Data), w.Offset, len(b))
			}
		}
		b = apply(b, writes...)
		opens(t, b, "new", slot)
		if writes, err = luks.RemoveKey(b, slot, nil); err != nil {
			t.Fatal(err)
		}
		b = apply(b, writes...)
		opens(t, b, "new", -1)
		open(t, b, "pw")
	})
}

package qcow

import (
	"errors"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

func (a *amendment) changesKeys() bool {
	return len(a.o.AddPassphrase) > 0 || len(a.o.RemovePassphrase) > 0 || len(a.o.RemoveKeySlots) > 0
}

// planKeys works out how passphrases are added and removed.
func (a *amendment) planKeys(img *Image) (err error) {
	if !a.changesKeys() {
		return nil
	}
	k, o := &a.keys, &a.o
	if k.header, err = img.readEncryptionHeader(); err != nil {
		return err
	}
	if len(o.AddPassphrase) > 0 {
		writes, _, err := luks.AddKey(a.ctx, k.header, o.Passphrase, o.AddPassphrase, o.KeyOptions)
		if err := k.add(writes, err); err != nil {
			return err
		}
	}
	if len(o.RemovePassphrase) > 0 {
		if err := k.removePassphrase(a); err != nil {
			return err
		}
	}
	for _, slot := range o.RemoveKeySlots {
		if err := k.add(luks.RemoveKey(k.header, slot, o.KeyOptions.Random)); err != nil {
			return err
		}
	}
	return nil
}

// changeKeys makes the writes of the plan, in their order and with a sync after each, as package luks demands.
func (a *amendment) changeKeys(img *Image) error {
	if !a.changesKeys() {
		return nil
	}
	off, _, err := img.header.Encryption()
	if err != nil {
		return err
	}
	for i, w := range a.keys.writes {
		if err := img.overwrite(off+format.HostOffset(w.Offset), a.keys.old[i], w.Data); err != nil {
			return fmt.Errorf("write encryption header: %w", err)
		}
		if err := img.sync(); err != nil {
			return err
		}
	}
	return nil
}

// keyChange collects changes of the encryption header.
type keyChange struct {
	header []byte // as it will be
	writes []luks.Write
	old    [][]byte // what each of them replaces
}

// add appends the writes of one change, which the next change is based on.
func (k *keyChange) add(writes []luks.Write, err error) error {
	if errors.Is(err, luks.ErrPassphrase) {
		err = fmt.Errorf("%w: %w", ErrPassphrase, err)
	}
	if err != nil {
		return err
	}
	for _, w := range writes {
		there := k.header[w.Offset:][:len(w.Data)]
		k.old = append(k.old, append([]byte(nil), there...))
		copy(there, w.Data)
	}
	k.writes = append(k.writes, writes...)
	return nil
}

// removePassphrase empties every key slot that the passphrase opens, at least one.
func (k *keyChange) removePassphrase(a *amendment) error {
	for n := 0; ; n++ {
		slot, err := luks.FindKey(a.ctx, k.header, a.o.RemovePassphrase)
		if n > 0 && errors.Is(err, luks.ErrPassphrase) {
			return nil
		}
		if err != nil {
			return k.add(nil, err)
		}
		if err := k.add(luks.RemoveKey(k.header, slot, a.o.KeyOptions.Random)); err != nil {
			return err
		}
	}
}

package qcow_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// amend changes properties of the image at rest. What is refused leaves every byte as it was.
func (m *model) amend(a, b uint64) error {
	if err := m.close(); err != nil {
		return err
	}
	o := m.amendment(a)
	class, err := m.mayAmend(&o)
	if err != nil {
		return err
	}
	before := m.file().Bytes()
	err = qcow.Amend(m.ctx, m.file(), o)
	switch {
	case class != nil && !bytes.Equal(before, m.file().Bytes()):
		return fmt.Errorf("amend to %+v, which is refused, has changed the file", o)
	case refused(err, class) != nil:
		return fmt.Errorf("amend to %+v: %w", o, refused(err, class))
	case class == nil:
		m.amended(&o)
	}
	if err := m.open(b); err != nil {
		return err
	}
	if m.another {
		if err := m.opensWith("another"); err != nil {
			return err
		}
	}
	return m.compare()
}

// amendment makes options of a number.
func (m *model) amendment(a uint64) qcow.AmendOptions {
	o := qcow.AmendOptions{Passphrase: []byte(passphrase)}
	yes, no := true, false
	switch a % 4 {
	case 0:
		o.Version = 2
	case 1:
		o.Version = 3
	}
	if a>>8%2 == 0 {
		o.RefcountBits = 1 << (a >> 9 % 7)
		if o.Version == 2 && a>>13%8 != 0 {
			o.RefcountBits = 16
		}
	}
	switch a >> 16 % 6 {
	case 0:
		o.LazyRefcounts = &yes
	case 1:
		o.LazyRefcounts = &no
	}
	switch a >> 24 % 12 {
	case 0:
		o.DataFileRaw = &yes
	case 1:
		o.DataFileRaw = &no
	}
	if m.kind.luks && a>>32%3 == 0 {
		o.KeyOptions = cheapKey(rand.New(rand.NewPCG(a, 0)))
		if m.another {
			o.RemovePassphrase = []byte("another")
		} else {
			o.AddPassphrase = []byte("another")
		}
	}
	return o
}

// mayAmend returns the class of error with which Amend refuses what the image, which is closed, can't have.
func (m *model) mayAmend(o *qcow.AmendOptions) (class, err error) {
	version, width := m.version, m.width
	if o.Version != 0 {
		version = o.Version
	}
	if o.RefcountBits != 0 {
		width = o.RefcountBits
	}
	r, err := newReferences(m.file().Bytes())
	if err != nil {
		return nil, err
	}
	compressed, err := r.compressed()
	if err != nil {
		return nil, err
	}
	sizes := false
	for _, k := range m.kept {
		sizes = sizes || len(k.content) != len(m.want)
	}
	down := version == 2 && m.version == 3
	switch {
	case version == 2 && (width != 16 || o.LazyRefcounts != nil && *o.LazyRefcounts),
		width != m.width && r.largest() > ^uint64(0)>>(64-width),
		o.DataFileRaw != nil && *o.DataFileRaw && !m.raw,
		down && (m.kind.external || m.kind.o.ExtendedL2 || len(m.bitmaps) > 0 || sizes || m.zstd && compressed):
		return qcow.ErrInvalid, nil
	}
	return nil, nil
}

// amended notes what the image is now.
func (m *model) amended(o *qcow.AmendOptions) {
	if o.RefcountBits != 0 {
		m.width = o.RefcountBits
	}
	if o.LazyRefcounts != nil {
		m.lazy = *o.LazyRefcounts
	}
	if o.DataFileRaw != nil {
		m.raw = *o.DataFileRaw
	}
	if o.Version != 0 {
		m.version = o.Version
	}
	if m.version == 2 {
		m.lazy, m.zstd = false, false
	}
	if len(o.AddPassphrase)+len(o.RemovePassphrase) > 0 {
		m.another = !m.another
	}
}

// opensWith expects that another passphrase opens the image.
func (m *model) opensWith(other string) error {
	img, err := qcow.Open(m.file(), qcow.Options{ReadOnly: true, WithoutBacking: true, Gate: m.files.gate, Passphrase: []byte(other)})
	if err != nil {
		return err
	}
	return img.Close()
}

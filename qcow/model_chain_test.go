package qcow_test

import (
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// inPool returns what is known of a file that may be a backing file.
func (m *model) inPool(name string) *modelFile {
	i := slices.IndexFunc(m.pool, func(f modelFile) bool { return f.name == name })
	return &m.pool[i]
}

// chainFrom returns the names of a file and those below it.
func (m *model) chainFrom(name string) (names []string) {
	for ; name != ""; name = m.inPool(name).below {
		names = append(names, name)
	}
	return names
}

// commit writes what the disk reads as to the backing file that was opened for that.
func (m *model) commit(a, _ uint64) error {
	o := qcow.CommitOptions{Empty: a%2 == 0}
	var class error
	if m.writable == 0 || len(m.kept) > 0 || o.Empty && m.writable > 1 {
		class = qcow.ErrInvalid
	}
	if err := m.img.Commit(m.ctx, o); err != nil || class != nil {
		return refused(err, class)
	}
	target := m.inPool(m.chain[m.writable-1])
	content := slices.Clone(m.want)
	if len(target.content) > len(content) {
		content = append(content, target.content[len(content):]...)
	}
	target.content = content
	return m.seeThrough(target)
}

// seeThrough is for when target has another content: what a file above it that has nothing at some place reads as is new there too.
// Which places these are only the file knows.
func (m *model) seeThrough(target *modelFile) error {
	for i := range m.pool {
		f := &m.pool[i]
		if f == target || !slices.Contains(m.chainFrom(f.name), target.name) {
			continue
		}
		now := make([]byte, len(f.content))
		img, err := m.readPool(f)
		if err != nil {
			return err
		}
		if _, err := img.ReadAt(now, 0); err != nil {
			return err
		}
		for off := range now {
			if now[off] != f.content[off] && (off >= len(target.content) || now[off] != target.content[off]) {
				return fmt.Errorf("byte %d of %s, which is on %s that was committed to, is %#x", off, f.name, target.name, now[off])
			}
		}
		f.content = now
	}
	return nil
}

// readPool opens a file of the pool, an image, for reading.
func (m *model) readPool(f *modelFile) (*qcow.Image, error) {
	o := m.options()
	o.ReadOnly = true
	return qcow.Open(m.files[f.name], o)
}

// comparePool expects that nothing but a commit changes a backing file.
func (m *model) comparePool() error {
	for i := range m.pool {
		f := &m.pool[i]
		if f.format == "qcow2" {
			img, err := m.readPool(f)
			if err != nil {
				return err
			}
			if err := holds(img, f.content); err != nil {
				return fmt.Errorf("backing file %s: %w", f.name, err)
			}
			continue
		}
		got := make([]byte, len(f.content)+1)
		if n, err := m.files[f.name].ReadAt(got, 0); n != len(f.content) {
			return fmt.Errorf("backing file %s has %d bytes instead of %d (%w)", f.name, n, len(f.content), errorOrNone(err))
		}
		if at := firstDifference(got[:len(f.content)], f.content); at >= 0 {
			return fmt.Errorf("byte %d of backing file %s is %#x instead of %#x", at, f.name, got[at], f.content[at])
		}
	}
	return nil
}

// rebase puts another file behind the image, or none. The old chain is open for reading only: nobody may open a file that another has open
// for writing.
func (m *model) rebase(a, b uint64) error {
	if m.writable > 0 {
		if err := m.reopen(b<<17|1<<16, 0); err != nil {
			return err
		}
	}
	o := qcow.RebaseOptions{Gate: m.files.gate, Passphrase: []byte(passphrase)}
	if i := int(a % uint64(len(m.pool)+1)); i > 0 {
		o.BackingFile, o.BackingFormat = m.pool[i-1].name, m.pool[i-1].format
	}
	var class error
	if len(m.kept) > 0 || m.raw && o.BackingFile != "" {
		class = qcow.ErrInvalid
	}
	err := m.img.Rebase(m.ctx, o)
	if class == nil {
		m.chain = m.chainFrom(o.BackingFile)
	}
	return refused(err, class)
}

// stream pulls in what backing files hold, as far as the one at some depth.
func (m *model) stream(a, _ uint64) error {
	o := qcow.StreamOptions{Base: int(a % uint64(len(m.chain)+1)), Piece: m.cluster << (a >> 32 % 4)}
	if a>>40%16 == 0 {
		o.Base = len(m.chain) + 1
	}
	nothing := o.Base == 1 || o.Base == 0 && len(m.chain) == 0
	var class error
	if o.Base > len(m.chain) || !nothing && len(m.kept) > 0 {
		class = qcow.ErrInvalid
	}
	err := m.img.Stream(m.ctx, o)
	if class == nil {
		m.keepFrom(o.Base)
	}
	return refused(err, class)
}

// keepFrom makes the file at a depth the image's own backing file; 0 means that there is none any more.
func (m *model) keepFrom(base int) {
	if base == 0 {
		m.chain, m.writable = nil, 0
		return
	}
	m.chain = m.chain[base-1:]
	m.writable = max(m.writable-base+1, 0)
}

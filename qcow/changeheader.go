package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// changeHeader changes the header, after everything written so far has become durable, and makes that durable. Whatever happens, the image
// has the old header or the new one: where no more than table pointers and sizes change this takes one write within one sector, else those of
// [format.Header.Rewrite]. When it fails the header is the old one, but for extensions that nobody needs, or the image is poisoned.
func (img *Image) changeHeader(change func(*format.Header)) error {
	img.headerMu.Lock()
	defer img.headerMu.Unlock()
	h := img.header
	change(&h)
	if err := img.syncAll(); err != nil {
		return err
	}
	if err := img.writeHeader(&h); err != nil {
		return err
	}
	img.header = h
	return nil
}

// writeHeader makes h what the file has as its header. The caller holds headerMu.
func (img *Image) writeHeader(h *format.Header) error {
	if h.SameButSwitch(&img.header) {
		if err := img.overwrite(format.SwitchOffset, img.header.EncodeSwitch(), h.EncodeSwitch()); err != nil {
			return fmt.Errorf("write header: %w", err)
		}
		return img.sync()
	}
	cluster, writes, err := img.planHeader(h)
	if err != nil {
		return err
	}
	for _, w := range writes {
		old := cluster[w.Offset:][:len(w.Data)]
		if err := img.overwrite(w.Offset, old, w.Data); err != nil {
			// The first sector may be the new one already, and what follows extensions that nobody needs.
			if now, _ := format.DecodeHeader(cluster); now != nil && now.Same(h) {
				return img.poisoned()
			}
			return fmt.Errorf("write header: %w", err)
		}
		copy(old, w.Data)
		if err := img.sync(); err != nil {
			return err
		}
	}
	return nil
}

// planHeader returns the first cluster as it is now, and the writes that lead from there to h.
func (img *Image) planHeader(h *format.Header) (cluster []byte, writes []format.HeaderWrite, err error) {
	cluster = make([]byte, h.ClusterSize())
	if err := readPadded(img.file, cluster, 0); err != nil {
		return nil, nil, fmt.Errorf("read header: %w", err)
	}
	writes, err = h.Rewrite(cluster)
	return cluster, writes, err
}

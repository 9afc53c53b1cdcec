package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// openDataFile opens the file that holds the guest's data.
func (img *Image) openDataFile(o Options) error {
	name := img.header.DataFileName()
	if name == "" {
		return format.Unsupportedf("header", format.IncompatibleOffset, "the image does not name its external data file")
	}
	opened, err := o.Gate.open(Reference{Role: DataFile, Name: name, Format: "raw", ReadOnly: img.readOnly})
	if err != nil {
		return fmt.Errorf("data file %q: %w", name, err)
	}
	img.data = opened.File
	return nil
}

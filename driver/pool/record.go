package pool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"
)

// Names in the storage directory.
const (
	poolFile    = "pool.json"
	lockFile    = "lock"
	volumesDir  = "volumes"
	tmpDir      = "tmp"
	volumeFile  = "volume.json"
	headImage   = "head.qcow2"
	asideSuffix = ".new" // of a file that is about to replace another
)

// recordVersion is the version of both records. It is raised when an older reader would misunderstand a newer record.
const recordVersion = 1

// poolRecord is pool.json.
type poolRecord struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
}

// record is volume.json.
type record struct {
	Version        int       `json:"version"`
	ID             string    `json:"id"`
	Name           string    `json:"name"`
	Created        time.Time `json:"created"`
	Head           string    `json:"head"`                     // file name of the head image, beside the record
	FilesystemType string    `json:"filesystemType,omitempty"` // wanted by whoever created the volume
	Format         Format    `json:"format"`
}

// Format says what was done to make a volume usable. It is the half of the guard against formatting a volume with data
// in it that has to outlive the process; the other half is whether the image has ever held data.
type Format struct {
	State      FormatState `json:"state"`
	Filesystem string      `json:"filesystem,omitempty"` // its type, for Formatting and Formatted
}

// FormatState is the state of a volume's format. Package mount says what follows from each.
type FormatState string

// The states.
const (
	NeverFormatted FormatState = "never-formatted" // nobody has used the volume
	Formatting     FormatState = "formatting"      // making a filesystem was begun, and not seen to end
	Formatted      FormatState = "formatted"       // the volume has a filesystem, which may hold data
	RawBlock       FormatState = "raw-block"       // it was handed out as a raw block device; what is on it is its user's
)

// validate returns nil when f is one of the states, with a filesystem exactly where there is one.
func (f Format) validate() error {
	switch f.State {
	case NeverFormatted, RawBlock:
		if f.Filesystem == "" {
			return nil
		}
	case Formatting, Formatted:
		if f.Filesystem != "" {
			return nil
		}
	}
	return fmt.Errorf("format state %q with filesystem %q", f.State, f.Filesystem)
}

func decodePool(b []byte) (poolRecord, error) {
	var r poolRecord
	if err := decode(b, poolFile, &r); err != nil {
		return r, err
	}
	if !ValidID(r.ID) {
		return r, fmt.Errorf("%w: %s: %q is no pool id", ErrCorrupt, poolFile, r.ID)
	}
	return r, nil
}

func decodeVolume(b []byte, id string) (record, error) {
	name := path.Join(volumesDir, id, volumeFile)
	var r record
	if err := decode(b, name, &r); err != nil {
		return r, err
	}
	switch {
	case r.ID != id:
		return r, fmt.Errorf("%w: %s: is the record of volume %q", ErrCorrupt, name, r.ID)
	case r.Name == "":
		return r, fmt.Errorf("%w: %s: no name", ErrCorrupt, name)
	case !validHead(r.Head):
		return r, fmt.Errorf("%w: %s: head image %q is no file name", ErrCorrupt, name, r.Head)
	}
	if err := r.Format.validate(); err != nil {
		return r, fmt.Errorf("%w: %s: %w", ErrCorrupt, name, err)
	}
	return r, nil
}

func validHead(s string) bool {
	base, ok := strings.CutSuffix(s, ".qcow2")
	return ok && ValidID(base)
}

// decode decodes a record strictly: one JSON object of a known version with known fields, and nothing after it.
func decode(b []byte, name string, into any) error {
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, name, err)
	}
	if v.Version != recordVersion {
		return fmt.Errorf("%w: %s has version %d, known is %d", ErrUnsupported, name, v.Version, recordVersion)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, name, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %s: goes on after its end", ErrCorrupt, name)
	}
	return nil
}

// encode is the inverse of decode, made to be read by people too.
func encode(r any) ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	return append(b, '\n'), err
}

package qcow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Role says what a file that an image names is for.
type Role uint8

// The files that an image can name.
const (
	BackingFile Role = iota
	DataFile
)

func (r Role) String() string {
	if r == DataFile {
		return "data file"
	}
	return "backing file"
}

// Reference is what an image says of another file. Name is whatever stands in the image: it must not be trusted.
type Reference struct {
	Role     Role
	Name     string
	Format   string // of a backing file as the image states it: "qcow2", "raw", ... or "" where it does not
	ReadOnly bool
}

// Opened is a file that a gate let through.
type Opened struct {
	File   storage.File // the image closes it
	Format string       // "qcow2" or "raw"; the gate's word, not the image's, is what counts
	Gate   Gate         // for what File names in turn; nil: nothing
}

// A Gate decides which of the files that an image names are opened, and opens them. Without a gate no such file is ever opened: whoever
// can write an image could have any file of the host read.
type Gate func(Reference) (Opened, error)

func (g Gate) open(r Reference) (Opened, error) {
	if g == nil {
		return Opened{}, format.Unsupportedf("header", 0, "the %v %q is not opened without the caller's leave", r.Role, r.Name)
	}
	return g(r)
}

// Beside returns a gate that opens what the image at path names, as QEMU would: relative names begin in the folder of the name that the
// image was opened by. It refuses names with a protocol ("nbd:", "json:"), which are no paths, and, with ErrCorrupt, files that the chain
// has come by already. It trusts the image, and the format that it states: it is for images of the user's own.
func Beside(path string) Gate {
	return beside(path, storage.ReadOnly, []string{path})
}

// BesideShared is Beside for an image that is only read, even while others write to the files that it names: these are not locked against that.
func BesideShared(path string) Gate {
	return beside(path, storage.Shared, []string{path})
}

// errLoop says that an image is its own backing file.
var errLoop = errors.New("the chain of backing files comes back to itself")

func beside(path string, reading storage.Mode, seen []string) Gate {
	return func(r Reference) (Opened, error) {
		if err := mustBePath(r.Name); err != nil {
			return Opened{}, err
		}
		name := r.Name
		if !filepath.IsAbs(name) { // not joined by package filepath, which takes "link/.." for nothing
			name = path[:strings.LastIndexByte(path, '/')+1] + name
		}
		target, err := filepath.EvalSymlinks(name)
		if err != nil {
			return Opened{}, err
		}
		info, err := os.Stat(target)
		if err != nil {
			return Opened{}, err
		}
		for _, s := range seen {
			if other, err := os.Stat(s); err == nil && os.SameFile(info, other) {
				return Opened{}, fmt.Errorf("%w: %w: %s", ErrCorrupt, errLoop, name)
			}
		}
		return openReference(target, reading, r, beside(name, reading, append(slices.Clip(seen), target)))
	}
}

// Within returns a gate that opens plain names of files in dir, and nothing else: no path, no link, no protocol.
func Within(dir string) Gate {
	return within(dir, nil)
}

func within(dir string, seen []string) Gate {
	return func(r Reference) (Opened, error) {
		if r.Name == "." || r.Name == ".." || strings.Contains(r.Name, "/") || mustBePath(r.Name) != nil {
			return Opened{}, format.Invalidf("%q is not the plain name of a file", r.Name)
		}
		if slices.Contains(seen, r.Name) {
			return Opened{}, fmt.Errorf("%w: %w: %s", ErrCorrupt, errLoop, r.Name)
		}
		return openReference(filepath.Join(dir, r.Name), storage.ReadOnly, r, within(dir, append(slices.Clip(seen), r.Name)))
	}
}

// mustBePath refuses what is not a path, or what QEMU would take for a protocol.
func mustBePath(name string) error {
	if i := strings.IndexAny(name, ":/"); name == "" || strings.ContainsRune(name, 0) || i >= 0 && name[i] == ':' {
		return format.Invalidf("%q is not a path", name)
	}
	return nil
}

// openReference opens the file at path; for reading in the mode that says how.
func openReference(path string, reading storage.Mode, r Reference, next Gate) (Opened, error) {
	mode := storage.ReadWrite
	if r.ReadOnly {
		mode = reading
	}
	f, err := storage.Open(path, mode)
	if err != nil {
		return Opened{}, err
	}
	return Opened{File: f, Format: r.Format, Gate: next}, nil
}

package mount

import "fmt"

// decision is what EnsureFilesystem does with a device.
type decision int

const (
	refuse  decision = iota // nothing; the error says why
	use                     // the filesystem that is recorded is there
	adopt                   // a filesystem is there that is not recorded: record it
	makeNew                 // make one on a device that was never written to
	remake                  // make one over the remains of our own mkfs
)

// decide is the format guard: given that the device could be read, what becomes of it? allocated counts only for a
// volume that was never formatted.
func decide(record FormatState, allocated bool, found Content, fs Filesystem) (decision, error) {
	switch record.Phase {
	case NeverFormatted:
		if !allocated {
			return decideBlank(found, fs)
		}
		return decideContent(found, fs, "The record says that it was never formatted, but its image was written to")
	case RawBlock:
		choice, err := decideContent(found, fs, "It was handed out as a raw block device, so a pod may have written "+
			"anything, zeroes included")
		if choice == adopt {
			choice = use // and it stays a raw block device in the record, which forbids mkfs for good
		}
		return choice, err
	case Formatting:
		return decideInterrupted(record, found, fs)
	case Formatted:
		return decideFormatted(record, found, fs)
	case Unrecorded:
	}
	return decideContent(found, fs, fmt.Sprintf("Its record is lost (%q)", record.Phase))
}

// decideBlank: neither the record nor the engine knows of any data.
func decideBlank(found Content, fs Filesystem) (decision, error) {
	if !found.Blank {
		return refuse, fmt.Errorf("%w: the image was never written to, and yet the device shows %s. Another image may be "+
			"attached to it; detach the volume and stage it again", ErrInconsistent, found)
	}
	if fs.ReadOnly() {
		return refuse, fmt.Errorf("%w: the volume has no filesystem yet; mount it writable once", ErrReadOnly)
	}
	return makeNew, nil
}

// decideContent: there may be data, and the device has the word on what; why says so.
func decideContent(found Content, fs Filesystem, why string) (decision, error) {
	switch found.Type {
	case fs.Type:
		return adopt, nil
	case "":
		return refuse, fmt.Errorf("%w: the device shows %s. %s. Look at the image (qcow-csi image check, map); if it holds "+
			"nothing of value, delete the volume and create it again", ErrNotBlank, found, why)
	}
	return refuse, wrongFilesystem(found.String(), fs)
}

// decideInterrupted: an mkfs of ours began. It began on a blank device that was never written to, and the volume was
// neither mounted nor published since. So whatever it holds was written by that mkfs, and mkfs goes over it.
func decideInterrupted(record FormatState, found Content, fs Filesystem) (decision, error) {
	switch {
	case record.Type != fs.Type:
		return refuse, wrongFilesystem("remains of an interrupted mkfs of "+record.Type, fs)
	case found.Type != "" && found.Type != fs.Type:
		return refuse, fmt.Errorf("%w: mkfs of %s was interrupted, which cannot have left behind %s. Another image may be "+
			"attached to the device; detach the volume and stage it again", ErrInconsistent, fs.Type, found)
	case fs.ReadOnly():
		return refuse, fmt.Errorf("%w: the volume's mkfs was interrupted; mount it writable once", ErrReadOnly)
	}
	return remake, nil
}

// decideFormatted: there was a filesystem, and pods may have data in it.
func decideFormatted(record FormatState, found Content, fs Filesystem) (decision, error) {
	switch {
	case record.Type != fs.Type:
		return refuse, wrongFilesystem("by its record "+record.Type, fs)
	case found.Type == "":
		return refuse, fmt.Errorf("%w: the volume was formatted with %s, but the device shows %s. Nothing was written to it. "+
			"Another image may be attached to it, or the filesystem is damaged: look at the image (qcow-csi image check), "+
			"then repair it or restore a snapshot", ErrInconsistent, record.Type, found)
	case found.Type != fs.Type:
		return refuse, wrongFilesystem(found.String(), fs)
	}
	return use, nil
}

func wrongFilesystem(holds string, fs Filesystem) error {
	return fmt.Errorf("%w: it holds %s, and %s is asked for. Ask for what it holds (fsType), or delete the volume and "+
		"create it again", ErrWrongFilesystem, holds, fs.Type)
}

// String says in an error what was found.
func (c Content) String() string {
	switch {
	case c.Type != "":
		return c.Type
	case c.Blank:
		return "only zeroes where a filesystem would be"
	}
	return "data of an unknown kind"
}

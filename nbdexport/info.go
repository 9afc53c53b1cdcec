package nbdexport

import "fmt"

// Info describes an export to its clients.
type Info struct {
	Size           int64 // bytes
	ReadOnly       bool
	MinimumBlock   uint32   // bytes, a power of two, 1 to 64 Ki; 0 means 1
	PreferredBlock uint32   // bytes, a power of two, 512 to 32 Mi, not below MinimumBlock; 0 means 4096 or MinimumBlock
	MultiConn      bool     // Flush on one connection covers writes acknowledged on all
	Rotational     bool     // seeking takes time
	FastZero       bool     // WriteZeroes understands Zeroing.Fast
	Direct         bool     // reads and writes want buffers that are aligned to pages, as O_DIRECT does
	Contexts       []string // the metadata contexts that Extents knows; names as the specification wants them
}

// TransmissionFlags returns the flags that tell a client what an export with this description can do (section
// "Transmission flags" of the specification). A kernel client that is set up without a handshake needs them.
func TransmissionFlags(i Info) uint16 {
	flags := FlagHasFlags | FlagSendFlush | FlagSendCache
	if i.ReadOnly {
		flags |= FlagReadOnly
	} else {
		flags |= FlagSendFUA | FlagSendTrim | FlagSendWriteZeroes
		if i.FastZero {
			flags |= FlagSendFastZero
		}
	}
	if i.MultiConn {
		flags |= FlagCanMultiConn
	}
	if i.Rotational {
		flags |= FlagRotational
	}
	return flags
}

// inspect asks b for its description, fills in the defaults and refuses one that the specification does not allow.
func inspect(b Backend) (Info, error) {
	i := b.Info()
	if i.MinimumBlock == 0 {
		i.MinimumBlock = 1
	}
	if i.PreferredBlock == 0 {
		i.PreferredBlock = max(4096, i.MinimumBlock)
	}
	switch {
	case i.Size < 0:
		return Info{}, fmt.Errorf("export of %d bytes", i.Size)
	case !powerOfTwo(i.MinimumBlock) || i.MinimumBlock > 64<<10:
		return Info{}, fmt.Errorf("minimum block of %d bytes", i.MinimumBlock)
	case !powerOfTwo(i.PreferredBlock) || i.PreferredBlock < max(512, i.MinimumBlock) || i.PreferredBlock > MaxPayload:
		return Info{}, fmt.Errorf("preferred block of %d bytes with a minimum of %d", i.PreferredBlock, i.MinimumBlock)
	case i.Size%int64(i.MinimumBlock) != 0:
		return Info{}, fmt.Errorf("export of %d bytes is no multiple of its minimum block, %d", i.Size, i.MinimumBlock)
	}
	for _, name := range i.Contexts {
		if !validContext(name) {
			return Info{}, fmt.Errorf("metadata context %.64q", name)
		}
	}
	return i, nil
}

func powerOfTwo(n uint32) bool { return n > 0 && n&(n-1) == 0 }

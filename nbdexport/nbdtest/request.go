package nbdtest

// Style is the form of requests and replies that client and server have agreed on.
type Style int

// The styles: without negotiation, after OptStructuredReply, after OptExtendedHeaders.
const (
	Simple Style = iota
	Structured
	Extended
)

// Styles are all of them.
var Styles = []Style{Simple, Structured, Extended}

func (s Style) String() string { return [...]string{"simple", "structured", "extended"}[s] }

// Request is a request as it goes over the wire. The zero value of Magic stands for the right one.
type Request struct {
	Magic   uint32
	Flags   uint16
	Command uint16
	Cookie  uint64
	Offset  uint64
	Length  uint64
	Payload []byte
	// AsIs keeps FlagPayloadLen from being added to an extended CmdWrite.
	AsIs bool
}

// Encode returns the bytes of the request in its compact form, that of all styles but Extended.
func (r Request) Encode() []byte { return r.EncodeIn(Simple) }

// EncodeIn returns the bytes of the request in the form of the style.
func (r Request) EncodeIn(s Style) []byte {
	magic, flags, length := uint32(RequestMagic), r.Flags, any(uint32(r.Length))
	if s == Extended {
		magic, length = ExtendedRequestMagic, r.Length
		if r.Command == CmdWrite && !r.AsIs {
			flags |= FlagPayloadLen
		}
	}
	if r.Magic != 0 {
		magic = r.Magic
	}
	return Message(magic, flags, r.Command, r.Cookie, r.Offset, length, r.Payload)
}

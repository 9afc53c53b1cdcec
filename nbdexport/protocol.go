package nbdexport

// The names and numbers of the protocol, from the section "Values" of the specification.

const (
	magicServer      uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption      uint64 = 0x49484156454F5054 // "IHAVEOPT"
	magicOptionReply uint64 = 0x3e889045565a9
	magicRequest     uint32 = 0x25609513
	magicSimpleReply uint32 = 0x67446698
)

// Handshake flags of the server, and the flags with which the client answers them.
const (
	handshakeFixedNewstyle uint16 = 1 << 0
	handshakeNoZeroes      uint16 = 1 << 1

	clientFixedNewstyle uint32 = 1 << 0
	clientNoZeroes      uint32 = 1 << 1
)

// option is what a client can ask for during the handshake.
type option uint32

const (
	optExportName option = 1
	optAbort      option = 2
	optList       option = 3
	optInfo       option = 6
	optGo         option = 7
)

// answer is the type of a reply to an option.
type answer uint32

const (
	repAck        answer = 1
	repServer     answer = 2
	repInfo       answer = 3
	repErrUnsup   answer = 1<<31 + 1
	repErrInvalid answer = 1<<31 + 3
	repErrUnknown answer = 1<<31 + 6
	repErrTooBig  answer = 1<<31 + 9
)

// Items of information about an export, in the replies to optInfo and optGo.
const (
	infoExport      uint16 = 0
	infoName        uint16 = 1
	infoDescription uint16 = 2
	infoBlockSize   uint16 = 3
)

// Transmission flags: what an export can do.
const (
	FlagHasFlags        uint16 = 1 << 0
	FlagReadOnly        uint16 = 1 << 1
	FlagSendFlush       uint16 = 1 << 2
	FlagSendFUA         uint16 = 1 << 3
	FlagSendTrim        uint16 = 1 << 5
	FlagSendWriteZeroes uint16 = 1 << 6
	FlagCanMultiConn    uint16 = 1 << 8
)

// command is the type of a request.
type command uint16

const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisc        command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdWriteZeroes command = 6
)

// Flags of a request.
const (
	commandFUA    uint16 = 1 << 0
	commandNoHole uint16 = 1 << 1
)

// errno is the error field of a reply.
type errno uint32

const (
	errnoNone  errno = 0
	errnoPerm  errno = 1
	errnoIO    errno = 5
	errnoInval errno = 22
	errnoNoSpc errno = 28
)

// Lengths in bytes of what goes over the wire.
const (
	optionHeaderSize = 8 + 4 + 4
	requestSize      = 4 + 2 + 2 + 8 + 8 + 4
	simpleReplySize  = 4 + 4 + 8
	reservedZeroes   = 124 // after the answer to optExportName, unless both sides do without
)

const (
	// MaxPayload is the most bytes that one request may read or write, 32 MiB. Clients are told in the handshake.
	MaxPayload = 32 << 20
	// maxString is the longest string that the specification allows, in bytes.
	maxString = 4096
)

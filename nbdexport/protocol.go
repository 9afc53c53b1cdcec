package nbdexport

// The names and numbers of the protocol, from the section "Values" of the specification, and from its extension
// EXTENDED_HEADERS.

const (
	magicServer          uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption          uint64 = 0x49484156454F5054 // "IHAVEOPT"
	magicOptionReply     uint64 = 0x3e889045565a9
	magicRequest         uint32 = 0x25609513
	magicExtendedRequest uint32 = 0x21e41c71
	magicSimpleReply     uint32 = 0x67446698
	magicStructuredReply uint32 = 0x668e33ef
	magicExtendedReply   uint32 = 0x6e8a278c
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
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optStartTLS        option = 5
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
	optListMetaContext option = 9
	optSetMetaContext  option = 10
	optExtendedHeaders option = 11
)

// answer is the type of a reply to an option.
type answer uint32

const (
	repAck                  answer = 1
	repServer               answer = 2
	repInfo                 answer = 3
	repMetaContext          answer = 4
	repErrUnsup             answer = 1<<31 + 1
	repErrInvalid           answer = 1<<31 + 3
	repErrTLSRequired       answer = 1<<31 + 5
	repErrUnknown           answer = 1<<31 + 6
	repErrTooBig            answer = 1<<31 + 9
	repErrExtHeaderRequired answer = 1<<31 + 10
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
	FlagHasFlags           uint16 = 1 << 0
	FlagReadOnly           uint16 = 1 << 1
	FlagSendFlush          uint16 = 1 << 2
	FlagSendFUA            uint16 = 1 << 3
	FlagRotational         uint16 = 1 << 4
	FlagSendTrim           uint16 = 1 << 5
	FlagSendWriteZeroes    uint16 = 1 << 6
	FlagSendDF             uint16 = 1 << 7
	FlagCanMultiConn       uint16 = 1 << 8
	FlagSendCache          uint16 = 1 << 10
	FlagSendFastZero       uint16 = 1 << 11
	FlagBlockStatusPayload uint16 = 1 << 12
)

// command is the type of a request.
type command uint16

const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisc        command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdCache       command = 5
	cmdWriteZeroes command = 6
	cmdBlockStatus command = 7
)

// Flags of a request.
const (
	commandFUA        uint16 = 1 << 0
	commandNoHole     uint16 = 1 << 1
	commandDF         uint16 = 1 << 2
	commandReqOne     uint16 = 1 << 3
	commandFastZero   uint16 = 1 << 4
	commandPayloadLen uint16 = 1 << 5
)

// chunkDone is the flag of the last chunk of a structured or extended reply.
const chunkDone uint16 = 1 << 0

// chunkType is the type of a chunk of a structured or extended reply.
type chunkType uint16

const (
	chunkNone           chunkType = 0
	chunkOffsetData     chunkType = 1
	chunkOffsetHole     chunkType = 2
	chunkBlockStatus    chunkType = 5
	chunkBlockStatusExt chunkType = 6
	chunkError          chunkType = 1<<15 + 1
)

// errno is the error field of a reply.
type errno uint32

const (
	errnoNone     errno = 0
	errnoPerm     errno = 1
	errnoIO       errno = 5
	errnoInval    errno = 22
	errnoNoSpc    errno = 28
	errnoOverflow errno = 75
	errnoNotSup   errno = 95
)

// Flags of the metadata context base:allocation.
const (
	// StateHole: the bytes have no space of their own; writing there may fail for want of space.
	StateHole uint64 = 1 << 0
	// StateZero: the bytes read as zeroes.
	StateZero uint64 = 1 << 1
)

// StateDirty is the flag of the metadata contexts qemu:dirty-bitmap:NAME.
const StateDirty uint64 = 1 << 0

// Names of metadata contexts.
const (
	ContextAllocation      = "base:allocation"
	ContextAllocationDepth = "qemu:allocation-depth"
	// ContextDirtyBitmap is followed by the name of a bitmap.
	ContextDirtyBitmap = "qemu:dirty-bitmap:"
)

// Lengths in bytes of what goes over the wire.
const (
	optionHeaderSize    = 8 + 4 + 4
	requestSize         = 4 + 2 + 2 + 8 + 8 + 4
	extendedRequestSize = 4 + 2 + 2 + 8 + 8 + 8
	simpleReplySize     = 4 + 4 + 8
	structuredChunkSize = 4 + 2 + 2 + 8 + 4
	extendedChunkSize   = 4 + 2 + 2 + 8 + 8 + 8
	holeSize            = 8 + 4 // of the payload of chunkOffsetHole
	reservedZeroes      = 124   // after the answer to optExportName, unless both sides do without
)

const (
	// MaxPayload is the most bytes that one request may read or write, 32 MiB. Clients are told in the handshake.
	MaxPayload = 32 << 20
	// maxString is the longest string that the specification allows, in bytes.
	maxString = 4096
)

package nbdtest

// Numbers of the protocol, for tests that build messages themselves.
const (
	OptExportName      = 1
	OptAbort           = 2
	OptList            = 3
	OptStartTLS        = 5
	OptInfo            = 6
	OptGo              = 7
	OptStructuredReply = 8
	OptListMetaContext = 9
	OptSetMetaContext  = 10
	OptExtendedHeaders = 11

	RepAck                  = 1
	RepServer               = 2
	RepInfo                 = 3
	RepMetaContext          = 4
	RepErrUnsup             = 1<<31 | 1
	RepErrInvalid           = 1<<31 | 3
	RepErrTLSRequired       = 1<<31 | 5
	RepErrUnknown           = 1<<31 | 6
	RepErrTooBig            = 1<<31 | 9
	RepErrExtHeaderRequired = 1<<31 | 10

	InfoExport      = 0
	InfoName        = 1
	InfoDescription = 2
	InfoBlockSize   = 3

	CmdRead        = 0
	CmdWrite       = 1
	CmdDisc        = 2
	CmdFlush       = 3
	CmdTrim        = 4
	CmdCache       = 5
	CmdWriteZeroes = 6
	CmdBlockStatus = 7

	FlagFUA        = 1 << 0
	FlagNoHole     = 1 << 1
	FlagDF         = 1 << 2
	FlagReqOne     = 1 << 3
	FlagFastZero   = 1 << 4
	FlagPayloadLen = 1 << 5

	ChunkNone           = 0
	ChunkData           = 1
	ChunkHole           = 2
	ChunkBlockStatus    = 5
	ChunkBlockStatusExt = 6
	ChunkError          = 1<<15 | 1
	ChunkErrorOffset    = 1<<15 | 2

	RequestMagic         = 0x25609513
	ExtendedRequestMagic = 0x21e41c71
	SimpleReplyMagic     = 0x67446698
	StructuredReplyMagic = 0x668e33ef
	ExtendedReplyMagic   = 0x6e8a278c
	OptionMagic          = 0x49484156454F5054
	OptionReplyMagic     = 0x3e889045565a9
)

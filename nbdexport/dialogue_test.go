package nbdexport_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// dialogue divides what a client has sent and what a server has answered, as the specification does, and checks that the
// one is an answer to the other. The export has blocks of 512 bytes.
type dialogue struct {
	in, out []byte
	ledger  nbdtest.Ledger
}

// cutBytes takes n bytes from the start of b, or nothing if there are less.
func cutBytes(b *[]byte, n int) []byte {
	if len(*b) < n {
		return nil
	}
	head := (*b)[:n]
	*b = (*b)[n:]
	return head
}

func (d *dialogue) check() error {
	d.ledger.Block = 512
	if greeting := cutBytes(&d.out, 18); string(greeting) != "NBDMAGICIHAVEOPT\x00\x03" {
		return fmt.Errorf("greeting % x", greeting)
	}
	flags := cutBytes(&d.in, 4)
	if flags == nil || binary.BigEndian.Uint32(flags) > 3 {
		return d.end()
	}
	for range 64 {
		done, err := d.option(flags[3]&2 != 0)
		if done || err != nil {
			return err
		}
	}
	return d.end()
}

// end wants nothing more from the server.
func (d *dialogue) end() error {
	if len(d.out) > 0 {
		return fmt.Errorf("% x after the end", d.out[:min(len(d.out), 64)])
	}
	return nil
}

// option checks the answer to one option. It says whether there is nothing more to check behind it.
func (d *dialogue) option(noZeroes bool) (done bool, err error) {
	header := cutBytes(&d.in, 16)
	if header == nil || binary.BigEndian.Uint64(header) != nbdtest.OptionMagic || binary.BigEndian.Uint32(header[12:]) > 1<<20 {
		return true, d.end()
	}
	option, length := binary.BigEndian.Uint32(header[8:]), int(binary.BigEndian.Uint32(header[12:]))
	if len(d.in) < length {
		return true, d.end()
	}
	d.in = d.in[length:]
	if option == nbdtest.OptExportName {
		if len(d.out) == 0 {
			return true, nil // refused
		}
		size := 10
		if !noZeroes {
			size += 124
		}
		if answer := cutBytes(&d.out, size); answer == nil || d.ledger.Style == nbdtest.Extended {
			return true, fmt.Errorf("answer to an export's name: % x", d.out)
		}
		return true, d.transmission()
	}
	acknowledged, err := d.replies(option)
	switch {
	case err != nil:
		return true, err
	case option == nbdtest.OptStartTLS && (acknowledged || len(d.out) == 0):
		return true, nil // what comes is TLS
	case option == nbdtest.OptAbort:
		return true, d.end()
	case !acknowledged:
	case option == nbdtest.OptGo:
		return true, d.transmission()
	case option == nbdtest.OptStructuredReply:
		d.ledger.Style = nbdtest.Structured
	case option == nbdtest.OptExtendedHeaders:
		d.ledger.Style = nbdtest.Extended
	}
	return false, nil
}

// replies checks the replies to one option up to the final one.
func (d *dialogue) replies(option uint32) (acknowledged bool, err error) {
	var contexts []uint32
	if option == nbdtest.OptSetMetaContext {
		d.ledger.Contexts = nil
	}
	for {
		header := cutBytes(&d.out, 20)
		if header == nil {
			if option == nbdtest.OptStartTLS {
				return false, nil // hung up: something was behind the option
			}
			return false, fmt.Errorf("option %d is not answered", option)
		}
		kind, length := binary.BigEndian.Uint32(header[12:]), int(binary.BigEndian.Uint32(header[16:]))
		data := cutBytes(&d.out, length)
		if binary.BigEndian.Uint64(header) != nbdtest.OptionReplyMagic || binary.BigEndian.Uint32(header[8:]) != option || length > 0 && data == nil {
			return false, fmt.Errorf("reply % x to option %d", header, option)
		}
		belongs := map[uint32][]uint32{
			nbdtest.RepServer: {nbdtest.OptList}, nbdtest.RepInfo: {nbdtest.OptInfo, nbdtest.OptGo},
			nbdtest.RepMetaContext: {nbdtest.OptListMetaContext, nbdtest.OptSetMetaContext},
		}
		switch {
		case kind == nbdtest.RepAck && length == 0:
			if option == nbdtest.OptSetMetaContext {
				d.ledger.Contexts = contexts
			}
			return true, nil
		case kind > 1<<31 && length <= 4096:
			return false, nil
		case !slices.Contains(belongs[kind], option) || length < 2:
			return false, fmt.Errorf("reply of type %#x with %d bytes to option %d", kind, length, option)
		case kind == nbdtest.RepMetaContext:
			contexts = append(contexts, binary.BigEndian.Uint32(data))
		}
	}
}

// transmission checks the replies to requests.
func (d *dialogue) transmission() error {
	requests, unique := requestsIn(d.in, d.ledger.Style, false)
	if !unique {
		return nil // nobody can tell the replies from each other
	}
	for _, r := range requests {
		d.ledger.Expect(r)
	}
	in := bytes.NewReader(d.out)
	for range requests {
		reply, err := d.ledger.Await(in)
		if err != nil {
			return err
		}
		if !slices.Contains([]error{nil, syscall.EINVAL, syscall.ENOSPC, syscall.EOVERFLOW}, reply.Err) { // the backend itself does not fail
			return fmt.Errorf("reply %d: %w", reply.Cookie, reply.Err)
		}
	}
	if in.Len() != 0 {
		return fmt.Errorf("%d bytes after the replies", in.Len())
	}
	return nil
}

// requestsIn divides a stream of requests. It returns those to which a reply is due, and whether each has a cookie of its
// own. It can give them their number as cookie.
func requestsIn(stream []byte, style nbdtest.Style, number bool) (requests []nbdtest.Request, unique bool) {
	magic, size := uint32(nbdtest.RequestMagic), 28
	if style == nbdtest.Extended {
		magic, size = nbdtest.ExtendedRequestMagic, 32
	}
	seen := make(map[uint64]bool)
	for len(stream) >= size && binary.BigEndian.Uint32(stream) == magic {
		if number {
			binary.BigEndian.PutUint64(stream[8:], uint64(len(requests)))
		}
		r := nbdtest.Request{
			Flags: binary.BigEndian.Uint16(stream[4:]), Command: binary.BigEndian.Uint16(stream[6:]),
			Cookie: binary.BigEndian.Uint64(stream[8:]), Offset: binary.BigEndian.Uint64(stream[16:]),
			Length: uint64(binary.BigEndian.Uint32(stream[24:])),
		}
		carries := r.Command == nbdtest.CmdWrite
		if style == nbdtest.Extended {
			r.Length, carries = binary.BigEndian.Uint64(stream[24:]), r.Flags&nbdtest.FlagPayloadLen != 0
			if carries && r.Length > nbdexport.MaxPayload {
				break
			}
		}
		if stream = stream[size:]; r.Command == nbdtest.CmdDisc {
			break
		}
		if carries {
			if uint64(len(stream)) < r.Length {
				break
			}
			r.Payload, stream = stream[:r.Length], stream[r.Length:]
		}
		requests = append(requests, r)
		seen[r.Cookie] = true
	}
	return requests, len(seen) == len(requests)
}

// isProtocolEnd says whether a connection may end with err when all of its client's bytes are there.
func isProtocolEnd(err error) bool {
	return err == nil || errors.Is(err, nbdexport.ErrDropped) || errors.Is(err, nbdexport.ErrProtocol) ||
		errors.Is(err, nbdexport.ErrUnknownExport)
}

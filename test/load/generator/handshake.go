package generator

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"

	"golang.org/x/sys/unix"
)

// Numbers of the protocol (section "Values" of its specification).
const (
	magicOption      = 0x49484156454F5054
	magicOptionReply = 0x3e889045565a9

	optGo              = 7
	optStructuredReply = 8

	repAck   = 1
	repInfo  = 3
	repError = 1 << 31 // the first of the errors

	infoExport = 0

	flagNoZeroes = 1 << 1 // of both sides' handshake flags; bit 0 is fixed newstyle
)

// target is what a URI names: nbd+unix:///export?socket=path.
type target struct {
	socket, export string
}

func parseURI(uri string) (target, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return target{}, err
	}
	t := target{u.Query().Get("socket"), ""}
	if len(u.Path) > 1 {
		t.export = u.Path[1:]
	}
	if u.Scheme != "nbd+unix" || t.socket == "" {
		return target{}, fmt.Errorf("%q is not of the form nbd+unix:///export?socket=path", uri)
	}
	return t, nil
}

// descriptor is a blocking socket.
type descriptor int

// Read implements io.Reader.
func (d descriptor) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(d), p)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// Write implements io.Writer.
func (d descriptor) Write(p []byte) (written int, err error) {
	for written < len(p) {
		n, err := unix.SendmsgN(int(d), p[written:], nil, nil, unix.MSG_NOSIGNAL)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return written, err
		}
		written += max(n, 0)
	}
	return written, nil
}

// session is a connection after the handshake.
type session struct {
	descriptor
	size       int64 // bytes, of the disk
	structured bool  // the server sends structured replies
}

// connect connects and chooses the export.
func connect(t target, structured bool) (_ *session, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s := &session{descriptor: descriptor(fd)}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", t.socket, errors.Join(err, unix.Close(fd)))
		}
	}()
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: t.socket}); err != nil {
		return nil, err
	}
	greeting := make([]byte, 18)
	if _, err := io.ReadFull(s, greeting); err != nil {
		return nil, err
	}
	flags := binary.BigEndian.Uint16(greeting[16:])
	if string(greeting[:16]) != "NBDMAGICIHAVEOPT" || flags&1 == 0 {
		return nil, fmt.Errorf("no fixed newstyle server: greeting %q", greeting)
	}
	if _, err := s.Write(binary.BigEndian.AppendUint32(nil, uint32(flags)&(1|flagNoZeroes))); err != nil {
		return nil, err
	}
	if structured {
		final, err := s.option(optStructuredReply, nil, func([]byte) {})
		if err != nil {
			return nil, err
		}
		s.structured = final == repAck
	}
	name := binary.BigEndian.AppendUint32(nil, uint32(len(t.export)))
	name = append(append(name, t.export...), 0, 0) // no further items of information
	final, err := s.option(optGo, name, func(info []byte) {
		if len(info) == 12 && binary.BigEndian.Uint16(info) == infoExport {
			s.size = int64(binary.BigEndian.Uint64(info[2:]))
		}
	})
	if err == nil && final != repAck {
		err = fmt.Errorf("export %q: reply %#x", t.export, final)
	}
	return s, err
}

// option sends an option, hands on the items of information in the replies, and returns the type of the last one.
func (s *session) option(option uint32, data []byte, info func([]byte)) (uint32, error) {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := s.Write(append(b, data...)); err != nil {
		return 0, err
	}
	for {
		header := make([]byte, 20)
		if _, err := io.ReadFull(s, header); err != nil {
			return 0, err
		}
		answer, length := binary.BigEndian.Uint32(header[12:]), binary.BigEndian.Uint32(header[16:])
		if binary.BigEndian.Uint64(header) != magicOptionReply || length > 1<<20 {
			return 0, fmt.Errorf("reply % x to option %d", header, option)
		}
		payload := make([]byte, length)
		if _, err := io.ReadFull(s, payload); err != nil {
			return 0, err
		}
		if answer == repAck || answer >= repError {
			return answer, nil
		}
		if answer == repInfo {
			info(payload)
		}
	}
}

// Hold connects, chooses the export and then makes no request: what an attached but idle disk looks like to a server.
func Hold(uri string) (io.Closer, error) {
	t, err := parseURI(uri)
	if err != nil {
		return nil, err
	}
	s, err := connect(t, false)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Close implements io.Closer.
func (s *session) Close() error { return unix.Close(int(s.descriptor)) }

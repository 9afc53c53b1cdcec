package driver

import (
	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// content is a message on its way into a log. It becomes text only when it is written, and without what is
// nobody's business: fields that the specification marks as secret, and mount flags, which it says may be.
type content struct{ message any }

func redacted(message any) content { return content{message} }

// String implements fmt.Stringer, for text logs.
func (c content) String() string {
	b, err := c.MarshalJSON()
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// MarshalJSON implements json.Marshaler, for JSON logs.
func (c content) MarshalJSON() ([]byte, error) {
	m, ok := c.message.(proto.Message)
	if !ok {
		return []byte("{}"), nil
	}
	m = proto.Clone(m)
	strip(m.ProtoReflect())
	return protojson.Marshal(m)
}

// strip removes secrets from m and from what is in it.
func strip(m protoreflect.Message) {
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case isSecret(field):
			m.Clear(field)
		case field.IsMap():
			if field.MapValue().Message() != nil {
				value.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					strip(v.Message())
					return true
				})
			}
		case field.Message() == nil:
		case field.IsList():
			for i := range value.List().Len() {
				strip(value.List().Get(i).Message())
			}
		default:
			strip(value.Message())
		}
		return true
	})
}

func isSecret(field protoreflect.FieldDescriptor) bool {
	if field.FullName() == "csi.v1.VolumeCapability.MountVolume.mount_flags" {
		return true
	}
	options, ok := field.Options().(*descriptorpb.FieldOptions)
	if !ok || !proto.HasExtension(options, csi.E_CsiSecret) {
		return false
	}
	secret, ok := proto.GetExtension(options, csi.E_CsiSecret).(bool)
	return ok && secret
}

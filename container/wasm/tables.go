package wasm

import (
	"encoding/binary"

	"github.com/musternet/muster/api"
)

// checkTables refuses a module with more than one table. Tables are not part
// of a program's memory limit: wazero lets each grow to 2^27 entries, a
// gigabyte, and a module may declare any number of them. Every compiler emits
// one.
func checkTables(module []byte) error {
	const (
		headerBytes  = 8 // magic and version
		tableSection = 4
	)
	if len(module) < headerBytes {
		return nil // not a module at all, which compiling it reports
	}
	tables := uint64(0)
	for rest := module[headerBytes:]; len(rest) > 0; {
		id := rest[0]
		size, n := binary.Uvarint(rest[1:])
		if n <= 0 || size > uint64(len(rest)-1-n) {
			return nil // likewise
		}
		content := rest[1+n:][:size]
		rest = rest[1+n:][size:]
		if id == tableSection {
			count, _ := binary.Uvarint(content)
			tables += count
		}
	}
	if tables > 1 {
		return api.Errorf(api.Unsupported, "wasm: the module has %d tables; at most one is supported", tables)
	}
	return nil
}

package outputs

import (
	"archive/tar"
	"bytes"
)

// Nearly every tar here is made of headers in one plain form: a regular file
// with a short ASCII name. They are written and recognized without the
// general code of archive/tar, which for a file of twenty bytes would cost more
// than compressing it does. Anything else goes through archive/tar; the bytes
// are the same either way.

const (
	tarBlock    = 512
	maxName     = 100
	maxSize     = 1<<33 - 1 // eleven octal digits
	sizeAt      = 124
	sizeDigits  = 11
	checksumAt  = 148
	checksumEnd = checksumAt + 8
)

// plainHeader is what archive/tar writes for an empty name and file, with blanks
// for the checksum; plainSum is the sum of its bytes.
var plainHeader, plainSum = func() (header [tarBlock]byte, sum uint64) {
	var b bytes.Buffer
	// A buffer takes everything and the name is valid, so there is no error.
	_ = tar.NewWriter(&b).WriteHeader(fileHeader("x", 0))
	copy(header[:], b.Bytes())
	header[0] = 0
	for i := checksumAt; i < checksumEnd; i++ {
		header[i] = ' '
	}
	for _, c := range header {
		sum += uint64(c)
	}
	return header, sum
}()

// isPlain says whether a file has a plain header.
func isPlain(name string, size int64) bool {
	if len(name) == 0 || len(name) > maxName || size < 0 || size > maxSize {
		return false
	}
	for i := range len(name) {
		if name[i] < 0x20 || name[i] > 0x7e {
			return false
		}
	}
	return name[len(name)-1] != '/'
}

// appendPlain appends the header of a plain file.
func appendPlain(b []byte, name string, size int64) []byte {
	at := len(b)
	b = append(b, plainHeader[:]...)
	header := b[at:]
	sum := plainSum
	copy(header, name)
	for i := range len(name) {
		sum += uint64(name[i])
	}
	for i := sizeAt + sizeDigits - 1; size > 0; i-- {
		digit := uint64(size & 7)
		header[i] += byte(digit)
		sum += digit
		size >>= 3
	}
	for i := checksumAt + 5; i >= checksumAt; i-- {
		header[i] = '0' + byte(sum&7)
		sum >>= 3
	}
	header[checksumAt+6] = 0
	return b
}

// padding is what follows size bytes of content.
func padding(size int64) int64 { return -size & (tarBlock - 1) }

var zeroBlocks [2 * tarBlock]byte

// plainFile is a file of a tar that is in memory.
type plainFile struct {
	name    string
	content []byte
}

// parsePlain appends the files of a tar to files. It says no to all but tars of
// plain headers with the two blocks of zeros that end one, and nothing behind.
func parsePlain(files []plainFile, b []byte) ([]plainFile, bool) {
	var want [tarBlock]byte
	for len(b) > len(zeroBlocks) {
		end := bytes.IndexByte(b[:maxName], 0)
		if end < 0 {
			end = maxName
		}
		name, size := string(b[:end]), int64(0)
		for _, digit := range b[sizeAt : sizeAt+sizeDigits] {
			size = size<<3 | int64(digit&7)
		}
		// What is what this would have written cannot mean anything else.
		if !isPlain(name, size) || !bytes.Equal(appendPlain(want[:0], name, size), b[:tarBlock]) {
			return files, false
		}
		b = b[tarBlock:]
		pad := padding(size)
		if size+pad > int64(len(b)) || !bytes.Equal(b[size:size+pad], zeroBlocks[:pad]) {
			return files, false
		}
		files = append(files, plainFile{name, b[:size:size]})
		b = b[size+pad:]
	}
	return files, bytes.Equal(b, zeroBlocks[:])
}

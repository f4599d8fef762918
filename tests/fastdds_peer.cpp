// A DDS peer that shares no code with ours: Fast DDS for the wire, Fast CDR for the bytes, types written out by hand.
//
//   fastdds_peer DOMAIN
//
// It listens to and announces 127.0.0.1 only. Commands come on standard input, one a line, until it is closed:
//   reader TOPIC TYPE RELIABILITY DURABILITY     TYPE: joint_state | joint_trajectory
//   writer TOPIC TYPE RELIABILITY DURABILITY     RELIABILITY: reliable | best_effort; DURABILITY: volatile | latched
//   write TOPIC FIRST COUNT POINTS               samples number FIRST, FIRST + 1, ...; POINTS of a trajectory
//   malform TOPIC COUNT                          payloads that are no sample of the topic's type
// Every event is a line of JSON on standard output: matched, incompatible, discovered, sent, received, undecodable.

#include <fastcdr/Cdr.h>
#include <fastcdr/FastBuffer.h>
#include <fastcdr/exceptions/Exception.h>
#include <fastdds/dds/domain/DomainParticipant.hpp>
#include <fastdds/dds/domain/DomainParticipantFactory.hpp>
#include <fastdds/dds/domain/DomainParticipantListener.hpp>
#include <fastdds/dds/publisher/DataWriter.hpp>
#include <fastdds/dds/publisher/Publisher.hpp>
#include <fastdds/dds/subscriber/DataReader.hpp>
#include <fastdds/dds/subscriber/SampleInfo.hpp>
#include <fastdds/dds/subscriber/Subscriber.hpp>
#include <fastdds/dds/topic/TopicDataType.hpp>
#include <fastdds/dds/topic/TypeSupport.hpp>
#include <fastdds/rtps/transport/UDPv4TransportDescriptor.h>
#include <fastrtps/utils/IPLocator.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

using namespace eprosima::fastdds::dds;
using eprosima::fastcdr::Cdr;
using eprosima::fastcdr::FastBuffer;
using eprosima::fastrtps::types::ReturnCode_t;
namespace rtps = eprosima::fastrtps::rtps;

constexpr uint32_t MAX_PAYLOAD = 1 << 20;  // [bytes]

// ---- the messages, field by field as in the .msg files

struct Stamp { int32_t sec = 0; uint32_t nanosec = 0; };
struct Header { Stamp stamp; std::string frame_id; };
struct JointState {
    Header header;
    std::vector<std::string> name;
    std::vector<double> position, velocity, effort;
    int defect = 0;  // not on the wire: how `malform` breaks the payload
};
struct Point { std::vector<double> positions, velocities, accelerations, effort; Stamp time_from_start; };
struct JointTrajectory {
    Header header;
    std::vector<std::string> joint_names;
    std::vector<Point> points;
    int defect = 0;
};

void put(Cdr& cdr, const Stamp& v) { cdr << v.sec << v.nanosec; }
void put(Cdr& cdr, const Header& v) { put(cdr, v.stamp); cdr << v.frame_id; }
void put(Cdr& cdr, const JointState& v) { put(cdr, v.header); cdr << v.name << v.position << v.velocity << v.effort; }
void put(Cdr& cdr, const JointTrajectory& v) {
    put(cdr, v.header);
    cdr << v.joint_names << static_cast<uint32_t>(v.points.size());
    for (const Point& p : v.points) {
        cdr << p.positions << p.velocities << p.accelerations << p.effort;
        put(cdr, p.time_from_start);
    }
}
void get(Cdr& cdr, Stamp& v) { cdr >> v.sec >> v.nanosec; }
void get(Cdr& cdr, Header& v) { get(cdr, v.stamp); cdr >> v.frame_id; }
void get(Cdr& cdr, JointState& v) { get(cdr, v.header); cdr >> v.name >> v.position >> v.velocity >> v.effort; }
void get(Cdr& cdr, JointTrajectory& v) {
    uint32_t count = 0;
    get(cdr, v.header);
    cdr >> v.joint_names >> count;
    v.points.clear();
    for (uint32_t k = 0; k < count; ++k) {
        Point p;
        cdr >> p.positions >> p.velocities >> p.accelerations >> p.effort;
        get(cdr, p.time_from_start);
        v.points.push_back(p);
    }
}

JointState joint_state(int number, int) {
    JointState v;
    v.header = {{1700000000 + number, static_cast<uint32_t>(number) * 1000u + 7u}, "base_" + std::to_string(number)};
    for (int j = 0; j < 7; ++j) {
        v.name.push_back("joint" + std::string(j, '_') + std::to_string(j));
        v.position.push_back(std::sin(0.1 * number + j));
        v.velocity.push_back(0.1 * std::cos(0.1 * number + j));
        v.effort.push_back(j == 3 ? std::nan("") : -1.5 * j);
    }
    return v;
}
JointTrajectory joint_trajectory(int number, int points) {
    JointTrajectory v;
    v.header = {{0, 0}, "policy:fast:" + std::to_string(number)};
    for (int j = 0; j < 7; ++j) v.joint_names.push_back("j" + std::to_string(j));
    for (int k = 1; k <= points; ++k) {
        Point p;
        for (int j = 0; j < 7; ++j) {
            p.positions.push_back(std::sin(0.01 * number + 0.1 * k + j));
            p.velocities.push_back(k == points ? 0.0 : std::cos(0.01 * number + 0.1 * k + j));
        }
        p.time_from_start = {k / 20, static_cast<uint32_t>(k % 20) * 50000000u};
        v.points.push_back(p);
    }
    return v;
}

// ---- JSON lines

std::string json(const std::string& v) { return "\"" + v + "\""; }
std::string json(double v) {
    char text[40];
    std::snprintf(text, sizeof text, "%.16e", v);  // 17 digits; always read as a float, -0.0 too
    return std::isnan(v) ? "NaN" : text;
}
std::string json(int64_t v) { return std::to_string(v); }
template <typename T> std::string json(const std::vector<T>& list) {
    std::string text = "[";
    for (const T& v : list) text += (text.size() > 1 ? "," : "") + json(v);
    return text + "]";
}
std::string pair(const char* key, const std::string& value) { return "\"" + std::string(key) + "\":" + value; }
int64_t nanoseconds(const Stamp& v) { return int64_t(v.sec) * 1000000000 + v.nanosec; }
std::string json(const Point& v) {
    return "{" + pair("positions", json(v.positions)) + "," + pair("velocities", json(v.velocities)) + "," +
           pair("time_ns", json(nanoseconds(v.time_from_start))) + "}";
}
std::string head(const Header& v) {
    return pair("stamp_ns", json(nanoseconds(v.stamp))) + "," + pair("frame_id", json(v.frame_id));
}
std::string json(const JointState& v) {
    return "{" + head(v.header) + "," + pair("name", json(v.name)) + "," + pair("position", json(v.position)) + "," +
           pair("velocity", json(v.velocity)) + "," + pair("effort", json(v.effort)) + "}";
}
std::string json(const JointTrajectory& v) {
    return "{" + head(v.header) + "," + pair("joint_names", json(v.joint_names)) + "," +
           pair("points", json(v.points)) + "}";
}
void say(const std::string& event, const std::string& topic, const std::string& rest) {
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    std::cout << "{" << pair("event", json(event)) << "," << pair("topic", json(topic)) << "," << rest << "}"
              << std::endl;
}

// ---- the type plug-in: Fast DDS knows the messages only through it

template <typename T> class Plugin : public TopicDataType {
  public:
    explicit Plugin(const char* name) { setName(name); m_typeSize = MAX_PAYLOAD; }
    bool serialize(void* data, rtps::SerializedPayload_t* payload) override {
        const T& value = *static_cast<T*>(data);
        FastBuffer buffer(reinterpret_cast<char*>(payload->data), payload->max_size);
        Cdr cdr(buffer, Cdr::DEFAULT_ENDIAN, Cdr::DDS_CDR);
        payload->encapsulation = cdr.endianness() == Cdr::BIG_ENDIANNESS ? CDR_BE : CDR_LE;
        cdr.serialize_encapsulation();
        if (value.defect == 1) {  // ends in the middle of a double
            put(cdr, value);
            payload->length = static_cast<uint32_t>(cdr.getSerializedDataLength()) - 12;
            return true;
        }
        if (value.defect == 2) {  // a string longer than the payload
            put(cdr, value.header.stamp);
            cdr << uint32_t(0x7fffffff) << uint32_t(0);
        } else if (value.defect == 3) {  // a sequence with more elements than any payload holds
            put(cdr, value.header);
            cdr << uint32_t(0xffffffff) << uint32_t(2);
        } else {
            put(cdr, value);
        }
        payload->length = static_cast<uint32_t>(cdr.getSerializedDataLength());
        return true;
    }
    bool deserialize(rtps::SerializedPayload_t* payload, void* data) override {
        try {
            FastBuffer buffer(reinterpret_cast<char*>(payload->data), payload->length);
            Cdr cdr(buffer, Cdr::DEFAULT_ENDIAN, Cdr::DDS_CDR);
            cdr.read_encapsulation();
            get(cdr, *static_cast<T*>(data));
            return true;
        } catch (const eprosima::fastcdr::exception::Exception& error) {
            say("undecodable", getName(), pair("bytes", json(int64_t(payload->length))));
            return false;
        }
    }
    std::function<uint32_t()> getSerializedSizeProvider(void*) override {
        return [] { return MAX_PAYLOAD; };
    }
    void* createData() override { return new T(); }
    void deleteData(void* data) override { delete static_cast<T*>(data); }
    bool getKey(void*, rtps::InstanceHandle_t*, bool) override { return false; }
};

// ---- endpoints

std::string ros_name(const std::string& topic) { return topic.rfind("rt/", 0) == 0 ? topic.substr(2) : topic; }

struct Watcher : DomainParticipantListener {
    void matched(const std::string& topic, int count) {
        say("matched", ros_name(topic), pair("count", json(int64_t(count))));
    }
    void incompatible(const std::string& topic, int policy) {
        say("incompatible", ros_name(topic), pair("policy", json(int64_t(policy))));
    }
    void on_publication_matched(DataWriter* w, const PublicationMatchedStatus& s) override {
        matched(w->get_topic()->get_name(), s.current_count);
    }
    void on_subscription_matched(DataReader* r, const SubscriptionMatchedStatus& s) override {
        matched(r->get_topicdescription()->get_name(), s.current_count);
    }
    void on_offered_incompatible_qos(DataWriter* w, const OfferedIncompatibleQosStatus& s) override {
        incompatible(w->get_topic()->get_name(), s.last_policy_id);
    }
    void on_requested_incompatible_qos(DataReader* r, const RequestedIncompatibleQosStatus& s) override {
        incompatible(r->get_topicdescription()->get_name(), s.last_policy_id);
    }
    template <typename Info, typename Status> void discovered(const Info& info, Status status, Status found) {
        if (status != found) return;
        const auto& octets = info.m_qos.m_userData.getValue();
        say("discovered", ros_name(info.topicName().to_string()),
            pair("type", json(info.typeName().to_string())) + "," +
                pair("user_data", json(std::string(octets.begin(), octets.end()))));
    }
    void on_publisher_discovery(DomainParticipant*, rtps::WriterDiscoveryInfo&& info) override {
        discovered(info.info, info.status, rtps::WriterDiscoveryInfo::DISCOVERED_WRITER);
    }
    void on_subscriber_discovery(DomainParticipant*, rtps::ReaderDiscoveryInfo&& info) override {
        discovered(info.info, info.status, rtps::ReaderDiscoveryInfo::DISCOVERED_READER);
    }
    template <typename T> void take(DataReader* reader) {
        T value;
        SampleInfo info;
        while (reader->take_next_sample(&value, &info) == ReturnCode_t::RETCODE_OK) {
            if (info.valid_data)
                say("received", ros_name(reader->get_topicdescription()->get_name()), pair("sample", json(value)));
        }
    }
    void on_data_available(DataReader* reader) override {
        if (reader->type().get_type_name().find("JointState_") != std::string::npos) take<JointState>(reader);
        else take<JointTrajectory>(reader);
    }
};

template <typename Qos> Qos endpoint_qos(Qos qos, const std::string& reliability, const std::string& durability) {
    const bool latched = durability == "latched";
    qos.reliability().kind = reliability == "reliable" ? RELIABLE_RELIABILITY_QOS : BEST_EFFORT_RELIABILITY_QOS;
    qos.durability().kind = latched ? TRANSIENT_LOCAL_DURABILITY_QOS : VOLATILE_DURABILITY_QOS;
    qos.history().kind = KEEP_LAST_HISTORY_QOS;
    qos.history().depth = latched ? 1 : 200;
    qos.endpoint().history_memory_policy = rtps::PREALLOCATED_WITH_REALLOC_MEMORY_MODE;
    return qos;
}

DomainParticipantQos loopback_only(uint32_t domain) {
    auto udp = std::make_shared<eprosima::fastdds::rtps::UDPv4TransportDescriptor>();
    udp->interfaceWhiteList.push_back("127.0.0.1");
    DomainParticipantQos qos;
    qos.name("fastdds_peer");
    qos.transport().use_builtin_transports = false;
    qos.transport().user_transports.push_back(udp);
    auto& wire = qos.wire_protocol();
    rtps::Locator_t locator;
    rtps::IPLocator::setIPv4(locator, "127.0.0.1");
    wire.participant_id = 24;  // away from the indices that other participants of a test take, within their search
    wire.builtin.metatrafficUnicastLocatorList.push_back(locator);  // and so no multicast group is joined
    wire.default_unicast_locator_list.push_back(locator);
    for (uint32_t index = 0; index < 10; ++index) {
        locator.port = 7400 + 250 * domain + 10 + 2 * index;
        wire.builtin.initialPeersList.push_back(locator);
    }
    return qos;
}

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    const uint32_t domain = static_cast<uint32_t>(std::stoul(argv[1]));
    Watcher watcher;
    // Without data_on_readers, which would swallow data_available.
    const StatusMask statuses = StatusMask::all() >> StatusMask::data_on_readers();
    DomainParticipant* participant = DomainParticipantFactory::get_instance()->create_participant(
        domain, loopback_only(domain), &watcher, statuses);
    if (participant == nullptr) return 1;
    const std::map<std::string, TypeSupport> types = {
        {"joint_state", TypeSupport(new Plugin<JointState>("sensor_msgs::msg::dds_::JointState_"))},
        {"joint_trajectory",
         TypeSupport(new Plugin<JointTrajectory>("trajectory_msgs::msg::dds_::JointTrajectory_"))},
    };
    for (const auto& type : types) type.second.register_type(participant);
    Publisher* publisher = participant->create_publisher(PUBLISHER_QOS_DEFAULT);
    Subscriber* subscriber = participant->create_subscriber(SUBSCRIBER_QOS_DEFAULT);
    std::map<std::string, DataWriter*> writers;
    auto topic_of = [&](const std::string& name, const std::string& type) {
        auto* found = dynamic_cast<Topic*>(participant->lookup_topicdescription("rt" + name));
        return found ? found : participant->create_topic("rt" + name, types.at(type).get_type_name(), TOPIC_QOS_DEFAULT);
    };
    say("ready", "", pair("domain", json(int64_t(domain))));
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string verb, name, type, reliability, durability;
        words >> verb >> name;
        if (verb == "reader" || verb == "writer") {
            words >> type >> reliability >> durability;
            Topic* topic = topic_of(name, type);
            if (verb == "reader")
                subscriber->create_datareader(topic, endpoint_qos(DATAREADER_QOS_DEFAULT, reliability, durability));
            else
                writers[name] =
                    publisher->create_datawriter(topic, endpoint_qos(DATAWRITER_QOS_DEFAULT, reliability, durability));
        } else if (verb == "write" || verb == "malform") {
            int first = 0, count = 0, points = 1;
            if (verb == "write") words >> first;
            words >> count >> points;
            DataWriter* writer = writers.at(name);
            const bool state = writer->get_type().get_type_name().find("JointState_") != std::string::npos;
            for (int k = first; k < first + count; ++k) {
                auto send = [&](auto value) {
                    value.defect = verb == "malform" ? 1 + k % 3 : 0;
                    if (writer->write(&value) && value.defect == 0) say("sent", name, pair("sample", json(value)));
                };
                if (state) send(joint_state(k, points));
                else send(joint_trajectory(k, points < 1 ? 1 : points));
                std::this_thread::sleep_for(std::chrono::milliseconds(2));
            }
            say("done", name, pair("count", json(int64_t(count))));
        }
    }
    participant->delete_contained_entities();
    DomainParticipantFactory::get_instance()->delete_participant(participant);
    return 0;
}
